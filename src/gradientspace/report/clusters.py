"""What a reader should know of each cluster: size, tokens, a title, its sources, central and boundary examples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gradientspace.plain_text import visible
from gradientspace.report.charts import colour_of
from gradientspace.report.figures import source_counts
from gradientspace.report.record import RunRecord
from gradientspace.rows import response_of
from gradientspace.titles import cluster_terms, title

_EXAMPLES = 3
_PROMPT, _RESPONSE = 420, 260


@dataclass(frozen=True)
class Example:
    """One sample as text, ready to show."""

    id: str
    source: str
    prompt: str
    response: str
    figures: str


@dataclass(frozen=True)
class Share:
    """A part of a cluster."""

    name: str
    count: int
    percent: float
    colour: str


@dataclass(frozen=True)
class Cluster:
    """One cluster as the page shows it."""

    number: int
    colour: str
    title: str
    size: int
    percent: float
    tokens: int | None
    sources: list[Share] = field(default_factory=list)
    central: list[Example] = field(default_factory=list)
    boundary: list[Example] = field(default_factory=list)
    flagged: int | None = None
    """Samples that the clusterer flags as near a boundary; None where it does not."""


def clusters_of(record: RunRecord) -> list[Cluster]:
    """Every cluster in the order of its number; empty where the run has none yet."""
    if record.assignments is None:
        return []
    sizes = np.bincount(record.clusters[record.clusters >= 0], minlength=record.n_clusters)
    terms = cluster_titles(record)
    sources = source_counts(record.sources, record.clusters, record.n_clusters) if record.sources else ([], None)
    tokens = record.fit["tokens"].to_numpy() if record.fit is not None else None
    flags = record.column("near_boundary") if record.has_column("near_boundary") else None
    found = []
    for k in range(record.n_clusters):
        members = np.flatnonzero(record.clusters == k)
        central, boundary = _central(record, members), _boundary(record, members)
        found.append(
            Cluster(
                number=k,
                colour=colour_of(k),
                title=terms[k],
                size=int(sizes[k]),
                percent=float(100 * sizes[k] / max(1, sizes.sum())),
                tokens=int(tokens[members].sum()) if tokens is not None else None,
                sources=_shares(sources[0], sources[1][k]) if sources[1] is not None else [],
                central=_examples(record, central, "cosine"),
                boundary=_examples(record, boundary, "margin"),
                flagged=int(flags[members].sum()) if flags is not None else None,
            )
        )
    return found


def cluster_titles(record: RunRecord) -> list[str]:
    """A line of telling terms for each cluster; "" where the run keeps no texts or nothing tells it apart."""
    if record.fit is None:
        return [""] * record.n_clusters
    return [title(t) for t in cluster_terms(record.fit["prompt"].to_pylist(), record.clusters, record.n_clusters)]


def _shares(names: list[str], counts: np.ndarray) -> list[Share]:
    total = max(1, int(counts.sum()))
    order = [j for j in np.argsort(-counts, kind="stable") if counts[j]]
    return [Share(names[j], int(counts[j]), float(100 * counts[j] / total), colour_of(int(j))) for j in order]


def _central(record: RunRecord, members: np.ndarray) -> np.ndarray:
    """The members most like their centroid."""
    if not record.has_column("cosine") or record.fit is None:
        return members[:0]
    return members[np.argsort(-record.column("cosine")[members], kind="stable")][:_EXAMPLES]


def _boundary(record: RunRecord, members: np.ndarray) -> np.ndarray:
    """The members that another centroid is nearest to, or nearly so."""
    if not record.has_column("margin") or record.fit is None or record.n_clusters < 2:
        return members[:0]
    return members[np.argsort(record.column("margin")[members], kind="stable")][:_EXAMPLES]


def _examples(record: RunRecord, rows: np.ndarray, measure: str) -> list[Example]:
    if record.fit is None or not len(rows):
        return []
    table = record.fit.take(rows).to_pylist()
    values = record.column(measure)[rows]
    return [
        Example(
            id=visible(row["id"], 60),
            source=visible(row["source"] or "", 40),
            prompt=visible(row["prompt"] or "", _PROMPT),
            response=visible(response_of(row["messages"]), _RESPONSE),
            figures=f"{measure} {value:+.2f}",
        )
        for row, value in zip(table, values, strict=True)
    ]
