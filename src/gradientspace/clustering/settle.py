"""After the online pass: settle labels by the recorded coordinates z = V u (N, q), where they can be trusted.

Labels in full dimension come from the clusterer's `predict` on a second gradient pass.
"""

from dataclasses import dataclass

import numpy as np

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


def coordinate_labels(coordinates: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Nearest centroid (N,) as the subspace sees it: the largest <z, V c_k>, from coordinates (N, q) and the
    centroids' own, V c_k (K, q). Rows without coordinates (all zero or non-finite) get -1."""
    usable = np.isfinite(coordinates).all(axis=1) & (coordinates != 0).any(axis=1)
    labels = np.full(len(coordinates), -1, dtype=np.int64)
    labels[usable] = (coordinates[usable] @ centres.T).argmax(axis=1)
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
    seen_centres = np.asarray(centres) @ np.asarray(components).T
    if not checked.any():
        raise RowsError("no checked row has a cluster: settling by coordinates needs some to compare with")
    seen = coordinate_labels(checked_coordinates[checked], seen_centres)
    agreement = float(np.mean(seen == checked_labels[checked]))
    if agreement < AGREEMENT_NEEDED:
        return Settled(labels, 0.0, agreement, True)
    settled = np.where(labels >= 0, coordinate_labels(coordinates, seen_centres), -1)
    return Settled(settled, moved_share(labels, settled), agreement, False)


def moved_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the rows with a cluster whose cluster changed."""
    kept = before >= 0
    return float(np.mean(before[kept] != after[kept])) if kept.any() else 0.0


def coordinate_energy(coordinates: np.ndarray) -> float:
    """Mean |z|^2 over the rows that have coordinates: 1 when V spans everything."""
    squares = np.square(coordinates, dtype=np.float64).sum(axis=1)
    return float(squares[squares > 0].mean()) if (squares > 0).any() else 0.0
