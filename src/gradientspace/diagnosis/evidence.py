"""What the inner products say: K, who pulls against whom, expected variance reduction, alignment of every grouping."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from gradientspace.clustering.stability import kmeans_stability
from gradientspace.config import GradientSpaceConfig
from gradientspace.conflict import group_cosines, group_inner_products, negative_share
from gradientspace.diagnosis.candidates import Candidate, candidates, coordinates, named_sources, one_adapter
from gradientspace.diagnosis.survey import Survey
from gradientspace.diagnosis.suspicious import suspicious_rows
from gradientspace.evaluation import paired_bootstrap

_KS = (2, 4, 8, 16)
_ROWS_A_GROUP = 10
_FEWEST_OF_SOURCE = 10


def weigh(survey: Survey, config: GradientSpaceConfig) -> dict[str, Any]:
    """All evidence but the pilot, as plain types."""
    reference, probe = survey.halves
    k, why = _choose_k(survey, config, len(reference))
    ks = sorted({n for n in (*_KS, k) if 1 < n <= len(reference) // _ROWS_A_GROUP})
    tried = [one_adapter(reference)]
    if (by_source := named_sources(survey, reference, config)) is not None:
        tried.append(by_source)
    by_k = {n: candidates(survey, reference, n, config) for n in ks}
    tried += [candidate for n in ks for candidate in by_k[n]]
    z = coordinates(survey.gram, reference)[reference]
    return {
        "schema": 1,
        "n_samples": len(survey.samples),
        "k": k,
        "k_reason": why,
        "rank": survey.rank,
        "negative_pairs": negative_share(survey.gram),
        "sources": _sources(survey),
        "alignment": [_alignment_row(survey, c, reference, probe, tried[0]) for c in tried],
        "stability": [{"n_clusters": n, **_stability(z, by_k[n][1].labels, config.seed)} for n in ks],
        "variance": [{"n_clusters": n, **_variance(survey, by_k[n][0], probe)} for n in ks],
        "embeddings_against_gradients": [
            {"n_clusters": n, "ari": float(adjusted_rand_score(by_k[n][1].labels, by_k[n][2].labels))} for n in ks
        ],
        "suspicious": suspicious_rows(survey, k, config),
    }


def _stability(points: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Agreement of reruns on random halves of the rows."""
    found = kmeans_stability(points, labels, normalise=False, random_state=seed).by_cause["all"]
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _choose_k(survey: Survey, config: GradientSpaceConfig, rows: int) -> tuple[int, str]:
    """The K that the pilot tries: the config's, else the spectrum's, else the config's stand-in."""
    asked, found, most = config.clustering.n_clusters, survey.rank["n_clusters"], max(1, rows // _ROWS_A_GROUP)
    if isinstance(asked, int):
        return min(asked, most), "the config asks for it"
    if found is not None:
        return min(found, most), survey.rank["reason"]
    return min(config.clustering.undetermined_n_clusters, most), f"undetermined ({survey.rank['reason']})"


def _sources(survey: Survey) -> dict[str, Any]:
    """Cosines between the sources' mean gradients, and how each pulls on the mean of all others.

    Many sources are looked at, so the pulls' intervals hold for all of them together (Bonferroni): one source whose
    interval lies below zero by chance is as rare as 95 % says.
    """
    names, numbers = np.unique(survey.sources, return_inverse=True)
    cosines = group_cosines(survey.gram, numbers, len(names))
    clean = np.nan_to_num(survey.gram)
    sizes = np.bincount(numbers)
    judged = [i for i, n in enumerate(sizes.tolist()) if min(n, len(numbers) - n) >= _FEWEST_OF_SOURCE]
    rows = []
    for i in judged:
        own = numbers == i
        pull = clean[np.ix_(own, ~own)].mean(axis=1)
        found = paired_bootstrap(pull, [""] * len(pull), level=1 - 0.05 / len(judged))
        rows.append({"name": names[i].item(), "n": len(pull), "pull_on_others": found})
    table = [[None if np.isnan(v) else float(v) for v in row] for row in cosines]
    return {"names": names.tolist(), "cosines": table, "pulls": rows}


def _alignment_row(
    survey: Survey, candidate: Candidate, reference: np.ndarray, probe: np.ndarray, single: Candidate
) -> dict[str, Any]:
    """Held-out routed alignment with intervals over the probe rows, and its gain over one adapter."""
    first, unit = routed_alignment(survey, candidate, reference, probe)
    _, base = routed_alignment(survey, single, reference, probe)
    strata = [""] * len(probe)
    return {
        "name": candidate.name,
        "n_groups": candidate.n_groups,
        "first_order": paired_bootstrap(first, strata),
        "unit_step": paired_bootstrap(unit, strata),
        "over_one_adapter": paired_bootstrap(unit - base, strata),
    }


def routed_alignment(
    survey: Survey, candidate: Candidate, reference: np.ndarray, probe: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per probe row j: <u_j, m_k> and <u_j, m_k / |m_k|>, m_k the mean unit gradient of the group it is routed to.

    The same numbers as `gradientspace.routable.RoutedAlignment`, from inner products. A group without reference rows
    has no step to take: its gain is 0.
    """
    member = (candidate.labels[:, None] == np.arange(candidate.n_groups)).astype(float)
    weights = member / np.maximum(member.sum(axis=0), 1)
    routed = candidate.route(survey.embeddings[probe])
    gains = (survey.gram[np.ix_(probe, reference)] @ weights)[np.arange(len(probe)), routed]
    squares = np.einsum("ik,ij,jk->k", weights, survey.gram[np.ix_(reference, reference)], weights, optimize=True)
    lengths = np.sqrt(np.clip(squares, 0, None))[routed]
    return gains, np.divide(gains, lengths, out=np.zeros_like(gains), where=lengths > 0)


def _variance(survey: Survey, candidate: Candidate, probe: np.ndarray) -> dict[str, float]:
    """Variance of the probe rows' unit gradients, and the share of it between the groups they are routed to.

    Unbiased, from products of different rows, so that random groups have a share of 0 on average (Theorem 2).
    """
    routed = candidate.route(survey.embeddings[probe])
    gram = survey.gram[np.ix_(probe, probe)]
    products = group_inner_products(gram, routed, candidate.n_groups)
    weights = np.bincount(routed, minlength=candidate.n_groups) / len(routed)
    overall = float(group_inner_products(gram, np.zeros(len(routed), dtype=int), 1)[0, 0])
    within = float(np.nansum(weights * np.diagonal(products)))
    return {"total": 1 - overall, "between": within - overall, "share": (within - overall) / (1 - overall)}
