"""How far a clustering depends on chance: reruns from other seeds, stream orders and draws, compared by adjusted Rand.

Everything here works on kept coordinates (N, q), so a rerun takes a fraction of a second and never touches the model.
The subspace itself is the same in all reruns: what another subspace would do needs other gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from sklearn.utils import check_random_state

from gradientspace.clustering.clusterer import OnlineSVDClusterer
from gradientspace.clustering.kmeans import spherical_kmeans
from gradientspace.clustering.unit_rows import RowsError

# Reruns work on at most this many random rows; all rows then get a label.
RERUN_ROWS = 4096
RERUNS_A_CAUSE = 4
# Restarts of a rerun's k-means: fewer than a real one's, so stability is if anything understated.
RERUN_RESTARTS = 3


@dataclass(frozen=True)
class Stability:
    """Adjusted Rand index between pairs of clusterings: mean, and 2.5th and 97.5th percentile of the pairs."""

    mean: float
    low: float
    high: float
    n_clusterings: int


@dataclass(frozen=True)
class Reruns:
    """`by_cause`: agreement of reruns in which one thing differed (`seeds`, `orders`, `draws`), and of those in which
    everything did (`all`). `support` (N,): share of all reruns that leave a row in its cluster, clusters matched."""

    by_cause: dict[str, Stability]
    support: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """The agreement where everything differed, and beside it that by cause."""
        causes = {cause: asdict(value) for cause, value in self.by_cause.items() if cause != "all"}
        return {**asdict(self.by_cause["all"]), "by_cause": causes}


# A rerun: rows that find the first centroids, seed, order of the stream -> labels of all rows.
Rerun = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


def online_stability(
    coordinates: np.ndarray, labels: np.ndarray, clusterer: OnlineSVDClusterer, *, random_state=None
) -> Reruns:
    """Reruns of the online pass with `clusterer`'s parameters, on the directions of the rows' coordinates (N, q)."""
    points = np.ascontiguousarray(coordinates, dtype=np.float32)
    k, batch = int(labels.max()) + 1, clusterer.batch_size

    def rerun(draw: np.ndarray, seed: int, order: np.ndarray) -> np.ndarray:
        online = copy(clusterer)
        online.set_params(n_clusters=k, random_state=seed, n_init=RERUN_RESTARTS, center=False).initialize(points[draw])
        for start in range(0, len(order), batch):
            online.partial_fit(points[order[start : start + batch]])
        return np.asarray(online.finalize().predict(points))

    rows = _usable(points)
    return _vary(
        rerun, labels, rows, min(clusterer.n_validation, len(rows)), ("seeds", "orders", "draws"), random_state
    )


def kmeans_stability(
    points: np.ndarray,
    labels: np.ndarray,
    *,
    normalise: bool = True,
    causes: Sequence[str] = ("seeds", "draws"),
    random_state=None,
) -> Reruns:
    """Reruns of spherical k-means on points (N, q), in `draws` on random halves of them; there is no order."""
    points = np.ascontiguousarray(points, dtype=np.float32)
    n_clusters = int(labels.max()) + 1

    def rerun(draw: np.ndarray, seed: int, order: np.ndarray) -> np.ndarray:
        centres = spherical_kmeans(points[draw], n_clusters, RERUN_RESTARTS, seed, normalise=normalise)[1]
        return (points @ np.asarray(centres, dtype=np.float32).T).argmax(axis=1)

    rows = _usable(points)
    return _vary(rerun, labels, rows, max(n_clusters, len(rows) // 2), causes, random_state)


def _usable(points: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isfinite(points).all(axis=1) & (points != 0).any(axis=1))


def _vary(
    rerun: Rerun, labels: np.ndarray, rows: np.ndarray, n_draw: int, causes: Sequence[str], random_state
) -> Reruns:
    """Let one cause differ at a time, then all of them."""
    random = check_random_state(random_state)
    if len(rows) > RERUN_ROWS:
        rows = np.sort(random.permutation(rows)[:RERUN_ROWS])
    n_draw = min(n_draw, len(rows))

    def new() -> dict[str, Any]:
        return {
            "draws": random.permutation(rows)[:n_draw],
            "seeds": int(random.randint(2**31 - 1)),
            "orders": random.permutation(rows),
        }

    fixed, by_cause = new(), {}
    agreeing, total = np.zeros(len(labels)), 0
    for cause in (*causes, "all"):
        found = []
        for _ in range(RERUNS_A_CAUSE):
            chosen = new() if cause == "all" else fixed | {cause: new()[cause]}
            found.append(rerun(chosen["draws"], chosen["seeds"], chosen["orders"]))
        by_cause[cause] = agreement([np.where(labels >= 0, one, -1)[rows] for one in found])
        agreeing += sum(matched(one, labels) == labels for one in found)
        total += len(found)
    return Reruns(by_cause, np.where(labels >= 0, agreeing / total, 0.0).astype(np.float32))


def matched(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`labels` (N,) renumbered so that as many rows as possible have their `reference` cluster's number."""
    both = (labels >= 0) & (reference >= 0)
    k = int(max(labels.max(initial=0), reference.max(initial=0))) + 1
    counts = np.bincount(labels[both] * k + reference[both], minlength=k * k).reshape(k, k)
    number = linear_sum_assignment(-counts)[1]
    return np.where(labels >= 0, number[labels], -1)


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


@dataclass(frozen=True)
class SweepRow:
    """One K of a sweep: `between`, the share of the points' energy that lies between the clusters' means;
    `stability` of reruns; `sizes` (K,), descending."""

    n_clusters: int
    between: float
    stability: Stability
    sizes: list[int]


def sweep(
    points: np.ndarray, n_clusters: Iterable[int], *, normalise: bool = True, random_state=None
) -> list[SweepRow]:
    """Quality and stability of clusterings of points (N, q) for several K. `between` rises with K by itself."""
    points = np.asarray(points, dtype=np.float64)
    rows = []
    for k in n_clusters:
        labels = np.asarray(spherical_kmeans(points, k, random_state=random_state, normalise=normalise)[0])
        sizes = np.bincount(labels[labels >= 0], minlength=k)
        reruns = kmeans_stability(points, labels, normalise=normalise, causes=(), random_state=random_state)
        share, ordered = between_share(points, labels), sorted(sizes.tolist(), reverse=True)
        rows.append(SweepRow(k, share, reruns.by_cause["all"], ordered))
    return rows


def between_share(points: np.ndarray, labels: np.ndarray) -> float:
    """Energy of the clusters' means, each counted for its rows, over that of all rows with a cluster."""
    kept = labels >= 0
    used, total = points[kept], float(np.square(points[kept]).sum())
    sizes = np.bincount(labels[kept])
    member = np.zeros((len(sizes), len(used)))
    member[labels[kept], np.arange(len(used))] = 1.0
    sums = member @ used
    return float((np.square(sums).sum(axis=1) / np.maximum(sizes, 1)).sum() / total) if total > 0 else 0.0
