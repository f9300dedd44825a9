"""Spherical k-means with restarts, on arrays that fit in memory (coordinates, embeddings)."""

import math

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from gradientspace.clustering.unit_rows import Rows, RowsError, with_norms

MAX_ITERATIONS = 100
# Restarts compete on at most this many rows; the winner is then refined on all of them.
RESTART_ROWS = 8192
# On many rows, Lloyd stops when fewer than this share of them change cluster in a step.
CHANGED_SHARE = 1e-4


def spherical_kmeans(
    Z: Rows, n_clusters: int, n_init: int = 10, random_state=None, *, normalise: bool = True
) -> tuple[Rows, Rows, float]:
    """Partition the rows of Z (N, q) by direction: (labels (N,) int64, centres (K, q) of unit length,
    objective).

    Maximises `sum_i <x_i, c_label(i)>` over unit centres, by greedy k-means++ seeding and Lloyd steps, best of
    `n_init`. With `normalise`, x_i = z_i / |z_i| (the usual spherical k-means). Without it x_i = z_i: labels
    still depend on directions only, but long rows pull harder on the centres. For coordinates z = V u of unit
    rows u that is spherical k-means of the rows themselves with centres confined to the span of V. Zero or
    non-finite rows get label -1. Raises RowsError when fewer valid rows than clusters are left. Clusters can
    come out empty only when there are fewer distinct directions than clusters. O(n_init * iterations * N K
    q).
    """
    as_numpy = not isinstance(Z, Tensor)
    rows = torch.as_tensor(np.asarray(Z, dtype=np.float64)) if as_numpy else Z.double()
    if rows.ndim != 2:
        raise RowsError(f"expected a 2-dimensional array (N, q), got shape {tuple(rows.shape)}")
    rows, norms, valid = with_norms(rows)
    unit = (rows / norms[:, None])[valid]
    weight = torch.ones_like(norms[valid]) if normalise else norms[valid]
    if n_clusters < 1 or n_clusters > len(unit):
        raise RowsError(f"n_clusters is {n_clusters}, but there are {len(unit)} rows with a direction: use 1 to that")
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    best = _best_start(unit, weight, n_clusters, n_init, generator)
    if len(unit) > RESTART_ROWS:
        best = _lloyd(unit, weight, best[1])
    labels, centres, objective = best
    full = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    full[valid] = labels
    if as_numpy:
        return full.numpy(), centres.numpy(), objective
    return full, centres.to(Z.dtype), objective


def _best_start(
    unit: Tensor, weight: Tensor, n_clusters: int, n_init: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """The best of `n_init` runs, on a random subset of the rows where there are very many."""
    if len(unit) > RESTART_ROWS:
        chosen = torch.randperm(len(unit), generator=generator)[:RESTART_ROWS].sort().values.to(unit.device)
        unit, weight = unit[chosen], weight[chosen]
    best: tuple[Tensor, Tensor, float] | None = None
    for _ in range(n_init if n_clusters > 1 else 1):
        found = _lloyd(unit, weight, _seed(unit, weight, n_clusters, generator))
        if best is None or found[2] > best[2]:
            best = found
    assert best is not None
    return best


def _seed(unit: Tensor, weight: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ on the sphere (Arthur and Vassilvitskii 2007; greedy as in scikit-learn).

    A few rows are drawn with probability proportional to weight (1 - cosine to the nearest centre), and the one that
    leaves the least of that becomes the next centre. One draw alone misses small clusters in most restarts.
    """
    trials = 2 + int(math.log(n_clusters))
    chosen = [_draw(weight, generator)]
    distance = (1.0 - unit @ unit[chosen[0]]).clamp(min=0)
    for _ in range(1, n_clusters):
        drawn = [_draw(weight * distance, generator) for _ in range(trials)]
        left = torch.minimum(distance, (1.0 - unit[drawn] @ unit.T).clamp(min=0))
        best = int((left @ weight).argmin())
        chosen.append(drawn[best])
        distance = left[best]
    return unit[chosen].clone()


def _draw(probability: Tensor, generator: torch.Generator) -> int:
    cumulative = probability.cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64).item() * float(cumulative[-1])
    return min(int(torch.searchsorted(cumulative, point, right=True)), len(probability) - 1)


def _lloyd(unit: Tensor, weight: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, float]:
    n_clusters = len(centres)
    weighted = unit * weight[:, None]
    labels = torch.full((len(unit),), -1, dtype=torch.int64, device=unit.device)
    for _ in range(MAX_ITERATIONS):
        cosine = unit @ centres.T
        nearest, new_labels = cosine.max(dim=1)
        new_labels = _fill_empty(new_labels, nearest, n_clusters)
        changed = int((new_labels != labels).sum())
        labels = new_labels
        if changed <= CHANGED_SHARE * len(labels):
            break
        member = torch.zeros(len(unit), n_clusters, dtype=unit.dtype, device=unit.device)
        sums = member.scatter_(1, labels[:, None], 1.0).T @ weighted
        lengths = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        # A cluster whose rows cancel out keeps its centre.
        centres = torch.where(lengths > 1e-12, sums / lengths.clamp(min=1e-12), centres)
    objective = float((weighted * centres[labels]).sum())
    return labels, centres, objective


def _fill_empty(labels: Tensor, nearest: Tensor, n_clusters: int) -> Tensor:
    """Give every empty cluster the row that fits its own cluster worst, unless all rows fit exactly."""
    counts = torch.bincount(labels, minlength=n_clusters)
    empty = (counts == 0).nonzero().squeeze(1)
    if not len(empty):
        return labels
    labels = labels.clone()
    order = nearest.argsort()
    position = 0
    for cluster in empty.tolist():
        while position < len(order) and counts[labels[order[position]]] < 2:
            position += 1
        if position == len(order) or nearest[order[position]] > 1.0 - 1e-12:
            break
        row = order[position]
        counts[labels[row]] -= 1
        labels[row] = cluster
        counts[cluster] += 1
        position += 1
    return labels


def merge_small_clusters(labels: np.ndarray, centres: Rows, min_size: int) -> tuple[np.ndarray, Rows, np.ndarray]:
    """Merge clusters of fewer than `min_size` rows into their nearest neighbour, the smallest first.

    Returns new labels (N,) without gaps, centres (K', D) of unit length (size-weighted where merged), and the
    new number (K,) of every old cluster. Nearness is cosine between centres. Label -1 stays. At least one
    cluster is left.
    """
    centres_out = torch.as_tensor(centres).clone()
    sizes = np.bincount(labels[labels >= 0], minlength=len(centres_out)).astype(float)
    target, alive = np.arange(len(sizes)), list(range(len(sizes)))
    while len(alive) > 1:
        small = min(alive, key=lambda cluster: (sizes[cluster], cluster))
        if sizes[small] >= min_size:
            break
        alive.remove(small)
        nearest = alive[int((centres_out[alive] @ centres_out[small]).argmax())]
        if sizes[small]:
            merged = sizes[nearest] * centres_out[nearest] + sizes[small] * centres_out[small]
            centres_out[nearest] = merged / torch.linalg.vector_norm(merged)
        sizes[nearest] += sizes[small]
        target[target == small] = nearest
    renumbered = np.searchsorted(alive, target)
    merged_labels = np.where(labels >= 0, renumbered[labels], -1)
    kept = centres_out[alive]
    return merged_labels, kept if isinstance(centres, Tensor) else kept.numpy(), renumbered
