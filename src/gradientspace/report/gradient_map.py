"""The gradient map: a sample of the rows in the plane that shows most of the clusters, packed for the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradientspace.plain_text import one_line
from gradientspace.report.charts import Chart, colour_of, draw
from gradientspace.report.figures import short, source_groups
from gradientspace.report.record import RunRecord
from gradientspace.rows import response_of

POINTS = 4000
"""Points on the map; their texts are what a page of any run weighs (about a megabyte)."""
_STATIC_POINTS = 1500
_FEWEST = 40
_PROMPT, _RESPONSE = 140, 80
_LEVELS = 2**16 - 1


@dataclass(frozen=True)
class GradientMap:
    """Sampled rows and where they lie. `rows` (n,) positions in `fit`, `points` (n, 2)."""

    rows: np.ndarray
    points: np.ndarray
    total: int


def gradient_map(record: RunRecord, seed: int = 0) -> GradientMap | None:
    """None where the run has no coordinates of at least two directions."""
    if not record.has_column("coordinates"):
        return None
    coordinates = _matrix(record)
    if coordinates.shape[1] < 2 or not (record.clusters >= 0).any():
        return None
    rows = _sample(record.clusters, np.random.default_rng(seed))
    plane = _plane(coordinates, record.clusters, record.n_clusters)
    return GradientMap(rows, coordinates[rows] @ plane.T, int((record.clusters >= 0).sum()))


def _matrix(record: RunRecord) -> np.ndarray:
    assert record.assignments is not None
    column = record.assignments["coordinates"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def _sample(clusters: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """At most about `POINTS` rows: every cluster gets its share, and at least 40 rows or all it has."""
    members = [np.flatnonzero(clusters == k) for k in np.unique(clusters[clusters >= 0])]
    total = sum(map(len, members))
    share = min(1.0, POINTS / total)
    chosen = [random.permutation(m)[: max(min(len(m), _FEWEST), round(share * len(m)))] for m in members]
    # In random order, so that no cluster is painted over all others.
    return random.permutation(np.concatenate(chosen))


def _plane(coordinates: np.ndarray, clusters: np.ndarray, n_clusters: int) -> np.ndarray:
    """(2, q) orthonormal: the plane in which the clusters' means differ most; with fewer than three clusters the
    rest is the direction in which the samples differ most."""
    kept = clusters >= 0
    rows, labels = coordinates[kept].astype(np.float64), clusters[kept]
    centred = rows - rows.mean(axis=0)
    sums = np.zeros((n_clusters, rows.shape[1]))
    np.add.at(sums, labels, centred)
    sizes = np.bincount(labels, minlength=n_clusters)
    means = sums / np.maximum(sizes, 1)[:, None]
    between = (means * sizes[:, None]).T @ means
    total = centred.T @ centred
    # A trace of the total scatter fills the plane where the means span less than two directions.
    values, vectors = np.linalg.eigh(between + 1e-6 * total)
    plane = vectors[:, np.argsort(-values)[:2]].T
    return plane * np.sign(plane[np.arange(2), np.abs(plane).argmax(axis=1)])[:, None]


def static_chart(record: RunRecord, found: GradientMap) -> Chart:
    """The map by cluster for paper, for readers without scripts, and as files."""
    clusters = record.clusters[found.rows]
    shown = slice(0, _STATIC_POINTS)

    def paint(axes: Any) -> None:
        for k in np.unique(clusters[shown]):
            mine = clusters[shown] == k
            axes.scatter(*found.points[shown][mine].T, s=4, color=colour_of(int(k)), alpha=0.65, lw=0, label=str(k))
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.legend(title="cluster", loc="upper left", bbox_to_anchor=(1, 1), fontsize=6.5, handletextpad=0.1,
                    markerscale=2.2)  # fmt: skip

    rows = [[int(r), float(x), float(y), int(k)]
            for r, (x, y), k in zip(found.rows, found.points, clusters, strict=True)]  # fmt: skip
    return draw(
        "gradient-map", "Gradient map", f"{len(found.rows):,} of {found.total:,} samples in the plane in which "
        f"the means of the {record.n_clusters} clusters differ most, coloured by cluster.",
        ["row of fit", "x", "y", "cluster"], rows, paint, height=2.7,
    )  # fmt: skip


def packed(record: RunRecord, found: GradientMap, titles: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws: coordinates as 16-bit numbers in base64, names, and a line of every sample."""
    low, high = found.points.min(axis=0), found.points.max(axis=0)
    unit = (found.points - low) / np.where(high > low, high - low, 1)
    result: dict[str, Any] = {
        "x": _base64(unit[:, 0] * _LEVELS),
        "y": _base64(unit[:, 1] * _LEVELS),
        "cluster": _base64(record.clusters[found.rows]),
        "colours": [colour_of(k) for k in range(record.n_clusters)],
        "clusters": [f"{k} · {short(text)}" if text else f"{k}" for k, text in enumerate(titles)],
    }
    if record.sources is not None and len(set(record.sources)) > 1:
        names, numbers = source_groups(record.sources)
        colours = [colour_of(j) for j in range(len(names))]
        result |= {"source": _base64(numbers[found.rows]), "sources": names, "sourceColours": colours}
    if record.has_column("loss"):
        loss = record.column("loss")[found.rows]
        ends = np.nanquantile(loss, [0.02, 0.98])
        scaled = (np.clip(loss, *ends) - ends[0]) / max(float(ends[1] - ends[0]), 1e-12)
        result |= {"loss": _base64(np.nan_to_num(scaled) * _LEVELS), "lossEnds": [float(e) for e in ends]}
    if record.fit is not None:
        texts = record.fit.take(found.rows)
        result["prompts"] = [one_line(t or "", _PROMPT) for t in texts["prompt"].to_pylist()]
        result["responses"] = [one_line(response_of(m), _RESPONSE) for m in texts["messages"].to_pylist()]
    return result


def _base64(values: np.ndarray) -> str:
    """Numbers from 0 to 65,535 as little-endian 16-bit words."""
    return base64.b64encode(np.round(values).astype("<u2").tobytes()).decode("ascii")
