"""After the online pass: settle labels, cluster again for another K, and say how stable the answer is.

All of it works on the recorded coordinates z = V u (N, q), a few hundred bytes a sample, so it takes seconds
and never touches the model. Labels in full dimension come from the clusterer's `predict` on a second gradient
pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from sklearn.metrics import adjusted_rand_score
from sklearn.utils import check_random_state

from gradientspace.clustering.kmeans import spherical_kmeans
from gradientspace.clustering.unit_rows import RowsError

AGREEMENT_NEEDED = 0.95


@dataclass(frozen=True)
class Settled:
    """`labels` (N,) after settling; `moved` the share of rows that changed cluster; `agreement` the share of
    the checked rows whose coordinates give the cluster that full dimension gives; `refused` when that is
    below 95 %, and then `labels` are the online ones."""

    labels: np.ndarray
    moved: float
    agreement: float
    refused: bool


def coordinate_labels(coordinates: np.ndarray, centres: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Nearest centroid (N,) as the subspace sees it: the largest <z, V c_k>, from coordinates (N, q),
    centroids (K, D) and V (q, D). Rows without coordinates (all zero or non-finite) get -1."""
    usable = np.isfinite(coordinates).all(axis=1) & (coordinates != 0).any(axis=1)
    labels = np.full(len(coordinates), -1, dtype=np.int64)
    labels[usable] = (coordinates[usable] @ (np.asarray(components) @ np.asarray(centres).T)).argmax(axis=1)
    return labels


def settle_by_coordinates(
    labels: np.ndarray,
    coordinates: np.ndarray,
    centres: np.ndarray,
    components: np.ndarray,
    *,
    checked_coordinates: np.ndarray,
    checked_labels: np.ndarray,
) -> Settled:
    """Reassign every row to the final centroids by its coordinates, where that can be trusted.

    `labels` (N,) are the online ones, some of them stale. The checked rows carry `predict`'s labels in full
    dimension under the same centroids; where coordinates repeat fewer than 95 % of those, nothing is changed.
    """
    checked = checked_labels >= 0
    if not checked.any():
        raise RowsError("no checked row has a cluster: settling by coordinates needs some to compare with")
    seen = coordinate_labels(checked_coordinates[checked], centres, components)
    agreement = float(np.mean(seen == checked_labels[checked]))
    if agreement < AGREEMENT_NEEDED:
        return Settled(labels, 0.0, agreement, True)
    settled = np.where(labels >= 0, coordinate_labels(coordinates, centres, components), -1)
    return Settled(settled, moved_share(labels, settled), agreement, False)


def moved_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the rows with a cluster whose cluster changed."""
    kept = before >= 0
    return float(np.mean(before[kept] != after[kept])) if kept.any() else 0.0


@dataclass(frozen=True)
class Reclustering:
    """A clustering of coordinates: `labels` (N,), `centres` (K, q) unit rows, `lifted` (K, D) unit rows in
    full dimension, and `energy`, the mean share of a unit row's energy that its coordinates hold (what a
    coordinate clustering can see at all)."""

    labels: np.ndarray
    centres: np.ndarray
    lifted: np.ndarray
    energy: float


def recluster(
    coordinates: np.ndarray, components: np.ndarray, n_clusters: int, *, n_init: int = 10, random_state=None
) -> Reclustering:
    """Spherical k-means of all coordinates (N, q) for another K or seed, centroids lifted by V (q, D)."""
    labels, centres, _ = spherical_kmeans(coordinates, n_clusters, n_init, random_state, normalise=False)
    components = np.asarray(components)
    lifted = np.asarray(centres).astype(components.dtype) @ components
    lifted /= np.linalg.norm(lifted, axis=1, keepdims=True)
    return Reclustering(np.asarray(labels), np.asarray(centres), lifted, coordinate_energy(coordinates))


def coordinate_energy(coordinates: np.ndarray) -> float:
    """Mean |z|^2 over the rows that have coordinates: 1 when V spans everything."""
    squares = np.square(coordinates, dtype=np.float64).sum(axis=1)
    return float(squares[squares > 0].mean()) if (squares > 0).any() else 0.0


@dataclass(frozen=True)
class Stability:
    """Adjusted Rand index between pairs of clusterings: its mean, and the 2.5th and 97.5th percentile of
    pairs."""

    mean: float
    low: float
    high: float
    n_clusterings: int


def agreement(labelings: Sequence[np.ndarray]) -> Stability:
    """How alike clusterings of the same rows are, from other seeds, stream orders or validation samples.

    Rows that are -1 in either of a pair are left out of it. Raises RowsError for fewer than two clusterings.
    """
    if len(labelings) < 2:
        raise RowsError(f"{len(labelings)} clustering given: agreement needs at least 2")
    scores = []
    for one, two in combinations(labelings, 2):
        both = (one >= 0) & (two >= 0)
        scores.append(adjusted_rand_score(one[both], two[both]))
    low, high = np.percentile(scores, [2.5, 97.5])
    return Stability(float(np.mean(scores)), float(low), float(high), len(labelings))


def coordinate_stability(
    coordinates: np.ndarray, n_clusters: int, *, n_runs: int = 5, share: float = 0.5, random_state=None
) -> Stability:
    """Agreement of clusterings whose centres come from random subsets of the rows, each applied to all rows.

    Another seed and other data at once: what a rerun on a new draw of the same mix would give.
    """
    random = check_random_state(random_state)
    usable = np.flatnonzero(np.isfinite(coordinates).all(axis=1) & (coordinates != 0).any(axis=1))
    size = max(n_clusters, round(share * len(usable)))
    labelings = []
    for _ in range(n_runs):
        chosen = np.sort(random.permutation(usable)[:size])
        seed = int(random.randint(2**31 - 1))
        centres = np.asarray(spherical_kmeans(coordinates[chosen], n_clusters, 5, seed, normalise=False)[1])
        labelings.append((coordinates[usable] @ centres.T).argmax(axis=1))
    return agreement(labelings)


@dataclass(frozen=True)
class SweepRow:
    """One K of a sweep: `objective`, the mean of <z, centre> over rows; `stability`; `sizes` (K,),
    descending."""

    n_clusters: int
    objective: float
    stability: Stability
    sizes: list[int]


def sweep(coordinates: np.ndarray, n_clusters: Iterable[int], *, random_state=None) -> list[SweepRow]:
    """Quality and stability of coordinate clusterings for several K."""
    rows = []
    for k in n_clusters:
        labels, _, objective = spherical_kmeans(coordinates, k, random_state=random_state, normalise=False)
        used = np.asarray(labels)[np.asarray(labels) >= 0]
        sizes = sorted(np.bincount(used, minlength=k).tolist(), reverse=True)
        stability = coordinate_stability(coordinates, k, random_state=random_state)
        rows.append(SweepRow(k, objective / len(used), stability, sizes))
    return rows
