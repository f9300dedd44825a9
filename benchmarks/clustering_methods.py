"""The methods that `clustering.py` compares, each from rows (N, D) in memory to labels and the bytes that it holds.

Bytes are counted, not measured: what the method keeps beside the batch that it reads, with numbers of four bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import Birch, MiniBatchKMeans
from torch import Tensor

from gradientspace.clustering import OnlineSVDClusterer, plan_memory, spherical_kmeans

N_VALIDATION, BATCH, RESTARTS = 512, 128, 10


@dataclass
class Cell:
    """Rows (N, D) with known clusters, in the order of the stream. `truth` (N,) is -1 for outliers."""

    rows: Tensor
    truth: Tensor
    n_clusters: int

    @property
    def n_validation(self) -> int:
        return min(N_VALIDATION, len(self.rows) // 2)


Found = dict[str, Tensor]
Method = Callable[[Cell], tuple[Found, int]]


def unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def online(cell: Cell, **options) -> tuple[Found, int]:
    """One pass over the stream; its first rows are the validation sample. "one pass": the labels that each batch got
    as it came by; "final": all rows under the centroids of the end, which takes a second pass."""
    clusterer = OnlineSVDClusterer(cell.n_clusters, 0, **options).initialize(cell.rows[: cell.n_validation])
    labels = torch.cat([torch.as_tensor(clusterer.partial_fit(b).labels_) for b in cell.rows.split(BATCH)])
    clusterer.finalize()
    final = torch.cat([torch.as_tensor(clusterer.predict(b)) for b in cell.rows.split(BATCH)])
    plan = plan_memory(
        cell.rows.shape[1], cell.n_clusters, n_validation=cell.n_validation, cache_size=clusterer.cache_size,
        update=clusterer.update, n_draws=0, batch_size=BATCH,
    )  # fmt: skip
    return {"one pass": labels, "final": final}, plan.peak


def ceiling(cell: Cell) -> tuple[Found, int]:
    """Spherical k-means on all centred full rows, through their Gram matrix built over blocks of columns."""
    n, dim = cell.rows.shape
    lengths = torch.linalg.vector_norm(cell.rows, dim=1, keepdim=True)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for block in cell.rows.split(8192, dim=1):
        block = block / lengths
        gram += (block @ block.T).double()
    gram -= gram.mean(dim=0, keepdim=True) + gram.mean(dim=1, keepdim=True) - gram.mean()
    values, vectors = torch.linalg.eigh(gram)
    labels, _, _ = spherical_kmeans(vectors * values.clamp(min=0).sqrt(), cell.n_clusters, RESTARTS, 0)
    return {"final": torch.as_tensor(labels)}, n * dim * 4


def mini_batch_kmeans(cell: Cell) -> tuple[Found, int]:
    model = MiniBatchKMeans(cell.n_clusters, random_state=0, n_init=RESTARTS)
    for batch in cell.rows.split(cell.n_validation):
        model.partial_fit(unit(batch).numpy())
    labels = np.concatenate([model.predict(unit(batch).numpy()) for batch in cell.rows.split(BATCH)])
    return {"final": torch.as_tensor(labels)}, (cell.n_validation + 3 * cell.n_clusters) * cell.rows.shape[1] * 4


def projected(cell: Cell, width: int, method: str) -> tuple[Found, int]:
    """Dense Gaussian random projection of unit rows, centred, then k-means of all (LESS) or BIRCH (ELREA)."""
    generator = torch.Generator().manual_seed(0)
    target, lengths = torch.zeros(len(cell.rows), width), torch.linalg.vector_norm(cell.rows, dim=1, keepdim=True)
    for block in cell.rows.split(1024, dim=1):
        target += (block / lengths) @ torch.randn(block.shape[1], width, generator=generator)
    rows = unit(target)
    rows = unit(rows - rows.mean(dim=0))
    if method == "kmeans":
        labels = spherical_kmeans(rows, cell.n_clusters, RESTARTS, 0)[0]
    else:
        labels = Birch(n_clusters=cell.n_clusters, threshold=0.7).fit_predict(rows.numpy())
    return {"final": torch.as_tensor(labels)}, rows.numel() * 4


METHODS: dict[str, Method] = {
    "online, svd": lambda cell: online(cell, update="svd"),
    "online, running": lambda cell: online(cell, update="running"),
    "ceiling": ceiling,
    "MiniBatchKMeans": mini_batch_kmeans,
    "projection 8192, k-means": lambda cell: projected(cell, 8192, "kmeans"),
    "projection 512, k-means": lambda cell: projected(cell, 512, "kmeans"),
    "projection 512, BIRCH": lambda cell: projected(cell, 512, "birch"),
}
