"""Ways to group the mix, each with a router of its own, fitted on the reference half (for the pilot, on all)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradientspace.clustering.kmeans import spherical_kmeans
from gradientspace.config import GradientSpaceConfig
from gradientspace.diagnosis.survey import Survey
from gradientspace.routable import RoutableMap
from gradientspace.router import LinearHead

COMPONENTS = 32
"""Gradient directions that clusters are made in, at most a quarter of the reference rows."""


@dataclass(frozen=True)
class Candidate:
    """`labels` (m,) of the rows it was fitted on, and `route`: embeddings (b, e) -> groups (b,)."""

    name: str
    n_groups: int
    labels: np.ndarray
    route: Callable[[np.ndarray], np.ndarray]


def coordinates(gram: np.ndarray, reference: np.ndarray, n_components: int = COMPONENTS) -> np.ndarray:
    """Coordinates (n, q) of centred unit gradients in the dominant directions of the rows `reference` (m,).

    From inner products alone (kernel PCA): the same numbers as projecting on the reference rows' singular vectors.
    """
    centred = _centred(np.nan_to_num(gram), reference)
    values, vectors = np.linalg.eigh(centred[np.ix_(reference, reference)])
    q = min(n_components, max(1, len(reference) // 4))
    values, vectors = values[::-1][:q], vectors[:, ::-1][:, :q]
    kept = values > 1e-9 * max(1.0, values[0])
    return centred[:, reference] @ (vectors[:, kept] / np.sqrt(values[kept]))


def _centred(gram: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Inner products after subtracting the reference rows' mean and scaling every row to length one."""
    with_mean = gram[:, reference].mean(axis=1)
    mean_square = with_mean[reference].mean()
    centred = gram - with_mean[:, None] - with_mean[None, :] + mean_square
    lengths = np.sqrt(np.clip(np.diagonal(centred), 1e-12, None))
    return centred / np.outer(lengths, lengths)


def candidates(survey: Survey, rows: np.ndarray, k: int, config: GradientSpaceConfig) -> list[Candidate]:
    """Routable gradients, plain gradients and embeddings at K, fitted on the positions `rows`."""
    x, z = survey.embeddings[rows], coordinates(survey.gram, rows)[rows]
    seed, options = config.seed, config.clustering
    routable = RoutableMap(k, alpha=options.ridge, n_init=options.n_init, random_state=seed).fit(x, z)
    plain = np.asarray(spherical_kmeans(z, k, options.n_init, seed, normalise=False)[0])
    embedded, centres, _ = spherical_kmeans(x, k, options.n_init, seed)
    head = _head(x, plain, seed)

    def by_map(embeddings: np.ndarray) -> np.ndarray:
        return np.asarray(routable.predict(embeddings).labels)

    return [
        Candidate("routable gradients", k, np.asarray(routable.labels_), by_map),
        Candidate("plain gradients", k, plain, head),
        Candidate("embeddings", k, np.asarray(embedded), lambda e: (e @ np.asarray(centres).T).argmax(axis=1)),
    ]  # fmt: skip


def one_adapter(rows: np.ndarray) -> Candidate:
    return Candidate("one adapter", 1, np.zeros(len(rows), dtype=int), lambda e: np.zeros(len(e), dtype=int))


def named_sources(survey: Survey, rows: np.ndarray, config: GradientSpaceConfig) -> Candidate | None:
    """The named sources, routed by prompt; None where there are fewer than two."""
    names, numbers = np.unique([survey.sources[i] for i in rows], return_inverse=True)
    if len(names) < 2:
        return None
    return Candidate("named sources", len(names), numbers, _head(survey.embeddings[rows], numbers, config.seed))


def _head(embeddings: np.ndarray, labels: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic router; numbers that do not occur are skipped over."""
    present, numbers = np.unique(labels, return_inverse=True)
    if len(present) == 1:
        return lambda e: np.full(len(e), present[0])
    head = LinearHead.fit(embeddings, numbers, seed)
    return lambda e: present[head.predict_scores(e).argmax(axis=1)]


def best_candidate(survey: Survey, evidence: dict[str, Any], config: GradientSpaceConfig) -> Candidate:
    """The grouping with the highest alignment at the K that is tried, fitted again on the whole sample.

    Alignment with a unit step: at equal K it orders groupings much as training does, the first-order gain does not
    (docs/clustering.md, measured by benchmarks/paper/alignment.py).
    """
    ranked = [
        row for row in evidence["alignment"] if row["n_groups"] == evidence["k"] and row["name"] != "named sources"
    ]
    best = max(ranked, key=lambda row: row["unit_step"]["mean"])
    rows = np.concatenate(survey.halves)
    return next(c for c in candidates(survey, rows, evidence["k"], config) if c.name == best["name"])
