"""The methods that `clustering.py` compares, each from rows (N, D) in memory to labels and the bytes that it holds.

Its bytes are counted: what the method keeps beside the batch that it reads, with numbers of four bytes. The peak that
`clustering.py` measures beside them has the libraries' copies too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import Birch, MiniBatchKMeans
from torch import Tensor

from gradientspace.clustering import OnlineSVDClusterer, plan_memory, spherical_kmeans
from gradientspace.clustering.running_svd import RunningSVD
from gradientspace.clustering.svd import gradient_svd

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


def decaying_momentum(cell: Cell) -> Found:
    """The paper's update with momentum 1 / (2 + moves), down to 0.02, in place of a constant."""
    clusterer = OnlineSVDClusterer(cell.n_clusters, 0).initialize(cell.rows[: cell.n_validation])
    labels, moves = [], 0.0
    for batch in cell.rows.split(BATCH):
        clusterer._state.momentum = max(0.02, 1.0 / (2.0 + moves))
        labels.append(torch.as_tensor(clusterer.partial_fit(batch).labels_))
        moves += len(batch) / cell.n_clusters / clusterer.cache_size
    return {"one pass": torch.cat(labels), "final": torch.as_tensor(clusterer.finalize().predict(cell.rows))}


def rank_of_a_cluster(cell: Cell, rank: int) -> Found:
    """Each cluster as the dominant `rank` directions of its rows: a row goes where most of it lies."""
    clusterer = OnlineSVDClusterer(cell.n_clusters, 0, update="running").initialize(cell.rows[: cell.n_validation])
    for batch in cell.rows.split(BATCH):
        clusterer.partial_fit(batch)
    labels = torch.as_tensor(clusterer.predict(cell.rows))
    centred = unit(unit(cell.rows) - torch.as_tensor(clusterer.mean_))
    energies = []
    for k in range(cell.n_clusters):
        members = centred[labels == k]
        basis = gradient_svd(members, rank, center=False).components
        energies.append((centred @ basis.T).square().sum(dim=1))
    return {"one pass": labels, "final": torch.stack(energies, dim=1).argmax(dim=1)}


def in_a_basis(cell: Cell, running: bool) -> Found:
    """K-means of all rows' coordinates in the validation basis, or in the running SVD's, which takes two passes."""
    frozen = gradient_svd(cell.rows[: cell.n_validation], 64)
    assert frozen.mean is not None
    centred, basis = unit(unit(cell.rows) - frozen.mean), frozen.components
    if running:
        following = RunningSVD(64, frozen.components, frozen.singular_values)
        for batch in centred[cell.n_validation :].split(BATCH):
            following.update(batch)
        assert following.components is not None
        basis = following.components
    labels = torch.as_tensor(spherical_kmeans(centred @ basis.T, cell.n_clusters, RESTARTS, 0)[0])
    return {"one pass": labels, "final": labels}


EXPERIMENTS: dict[str, Callable[[Cell], Found]] = {
    "running, q = K - 1": lambda cell: online(cell, update="running", n_components=cell.n_clusters - 1)[0],
    "svd, decaying momentum": decaying_momentum,
    "rank 3 a cluster": lambda cell: rank_of_a_cluster(cell, 3),
    "k-means of all coordinates": lambda cell: in_a_basis(cell, running=False),
    "the same, running SVD as basis": lambda cell: in_a_basis(cell, running=True),
}
"""Ideas that are not options of the clusterer, measured beside them."""


def isometry(gram: Tensor) -> Tensor:
    """Rows (N, N) float64 with these inner products: k-means sees nothing else, and they are shorter."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


def ceiling(cell: Cell) -> tuple[Found, int]:
    """Spherical k-means on all centred full rows, through their Gram matrix built over blocks of columns."""
    n, dim = cell.rows.shape
    lengths = torch.linalg.vector_norm(cell.rows, dim=1, keepdim=True)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for block in cell.rows.split(8192, dim=1):
        block = block / lengths
        gram += (block @ block.T).double()
    gram -= gram.mean(dim=0, keepdim=True) + gram.mean(dim=1, keepdim=True) - gram.mean()
    labels, _, _ = spherical_kmeans(isometry(gram), cell.n_clusters, RESTARTS, 0)
    return {"final": torch.as_tensor(labels)}, n * dim * 4


def mini_batch_kmeans(cell: Cell) -> tuple[Found, int]:
    model = MiniBatchKMeans(cell.n_clusters, random_state=0, n_init=RESTARTS)
    for batch in cell.rows.split(cell.n_validation):
        model.partial_fit(unit(batch).numpy())
    labels = np.concatenate([model.predict(unit(batch).numpy()) for batch in cell.rows.split(BATCH)])
    return {"final": torch.as_tensor(labels)}, (cell.n_validation + 3 * cell.n_clusters) * cell.rows.shape[1] * 4


def project(rows: Tensor, width: int) -> Tensor:
    """Random projection (N, width) of unit rows: Gaussian, or where that would take longest, on long rows, sparse with
    four signs a column (Kane and Nelson 2014)."""
    generator = torch.Generator().manual_seed(0)
    target, lengths = torch.zeros(len(rows), width), torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for block in rows.split(1024, dim=1):
        block = block / lengths
        if rows.shape[1] <= width:
            target += block @ torch.randn(block.shape[1], width, generator=generator)
            continue
        for part in range(4):
            bins = torch.randint(width // 4, (block.shape[1],), generator=generator) + part * (width // 4)
            signs = torch.randint(2, (block.shape[1],), generator=generator) * 2.0 - 1.0
            target.index_add_(1, bins, block * signs)
    return target


def projected(cell: Cell, width: int, method: str) -> tuple[Found, int]:
    """Random projection, centred, then k-means of all rows (LESS) or BIRCH (ELREA)."""
    rows = unit(project(cell.rows, width))
    rows = unit(rows - rows.mean(dim=0))
    if method == "kmeans":
        points = isometry(rows @ rows.T) if width > len(rows) else rows
        labels = spherical_kmeans(points, cell.n_clusters, RESTARTS, 0)[0]
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
