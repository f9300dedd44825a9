"""Planted clusters in high dimension: the truth that clustering tests compare with."""

import torch
from torch import Tensor


def planted_rows(
    n: int,
    dim: int,
    n_clusters: int,
    cosine: float,
    *,
    seed: int = 0,
    weights: list[float] | None = None,
    common: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rows (n, dim) of random length, `cosine` between two of a cluster, and the clusters (n,).

    Cluster directions are orthonormal; `common` is the squared cosine with one direction that all rows share.
    """
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.ones(n_clusters) if weights is None else torch.tensor(weights)
    labels = torch.multinomial(probabilities, n, replacement=True, generator=generator)
    directions = torch.linalg.qr(torch.randn(dim, n_clusters + 1, generator=generator)).Q.T
    noise = torch.randn(n, dim, generator=generator)
    noise /= torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    rows = noise * (1.0 - cosine - common) ** 0.5
    rows += cosine**0.5 * directions[labels] + common**0.5 * directions[n_clusters]
    return rows * (torch.rand(n, 1, generator=generator) + 0.5), labels
