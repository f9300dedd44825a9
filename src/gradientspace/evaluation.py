"""Metrics and statistics: losses and exact match by domain, agreement of clusterings, intervals, the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BOOTSTRAP_DRAWS = 10_000


def summarise(
    losses: np.ndarray, tokens: np.ndarray, domains: Sequence[str], exact: np.ndarray | None = None
) -> dict[str, Any]:
    """One method's numbers, overall and by domain.

    `loss` is the mean over samples of each sample's mean completion-token cross-entropy in nats; `token_loss` the
    mean over tokens, and `perplexity` its exponential. `losses`, `tokens` and the 0/1 `exact` are (n,); the latter is
    absent where nothing was generated.
    """

    def numbers(rows: np.ndarray) -> dict[str, Any]:
        result: dict[str, Any] = {
            "loss": float(losses[rows].mean()),
            "token_loss": float((losses[rows] * tokens[rows]).sum() / tokens[rows].sum()),
            "n": int(rows.sum()),
        }
        result["perplexity"] = float(np.exp(result["token_loss"]))
        if exact is not None:
            result["exact_match"] = float(exact[rows].mean())
        return result

    labels = np.asarray(domains)
    by_domain = {str(d): numbers(labels == d) for d in sorted(set(domains))}
    overall = numbers(np.ones(len(losses), dtype=bool))
    overall["domain_mean_token_loss"] = float(np.mean([v["token_loss"] for v in by_domain.values()]))
    return {"overall": overall, "by_domain": by_domain}


def agreement(clusters: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Adjusted Rand, normalised mutual information and purity of clusters (n,) against labels; -1 is left out.

    Purity is the share of samples whose label is the most frequent one of their cluster.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    kept = clusters >= 0
    found, truth = clusters[kept], np.asarray(labels)[kept]
    majority = sum(np.unique(truth[found == k], return_counts=True)[1].max() for k in np.unique(found))
    return {
        "ari": float(adjusted_rand_score(truth, found)),
        "nmi": float(normalized_mutual_info_score(truth, found)),
        "purity": float(majority / max(1, kept.sum())),
    }


def paired_bootstrap(
    differences: np.ndarray, strata: Sequence[str], *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """Mean of paired differences (n,) and its percentile interval, resampled within each stratum."""
    generator = np.random.default_rng(seed)
    labels = np.asarray(strata)
    sums = np.zeros(draws)
    for stratum in np.unique(labels):
        values = differences[labels == stratum]
        # Drawing n of n with replacement gives multinomial counts: one (draws, n) product instead of n lookups.
        for start in range(0, draws, 1000):
            size = min(1000, draws - start)
            counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=size)
            sums[start : start + size] += counts @ values
    means = sums / len(differences)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}


def normalise_white_space(text: str) -> str:
    return " ".join(text.split())


def variance_shares(counts: np.ndarray, sums: np.ndarray) -> dict[str, float]:
    """Total, within and between variance of unit gradients from each cluster's count (K,) and sum (K, D).

    The sums are of *uncentred* unit gradients, in float64. For unit vectors E|u|^2 = 1, so the variance of a group
    is 1 - |mean|^2, and within + between = total by the law of total variance (Lemma 1 of the paper).
    """
    weights = counts / counts.sum()
    means = sums / np.maximum(counts, 1)[:, None]
    within = float((weights * (1 - (means**2).sum(axis=1))).sum())
    overall = weights @ means
    total = float(1 - (overall**2).sum())
    return {"total": total, "within": within, "between": total - within}


def verdict(results: dict[str, Any]) -> list[str]:
    """Two lines in words: did one expert a prompt beat one adapter on the mix, and what follows.

    "Split" needs a paired interval above zero, in exact match where answers were generated, else in loss; a gain in
    loss must also have the same sign per sample, per token and per token averaged over domains.
    """
    k = results["clustering"]["n_clusters"]
    if k == 1:
        return [
            "The gradients show no groups that pull apart (K = 1): experts would be one adapter again.",
            "Verdict: keep one adapter.",
        ]
    comparison = results["comparisons"]["gradientspace - single"]
    generated = "exact_match" in comparison
    gain = comparison["exact_match"] if generated else {k: -v for k, v in comparison["loss"].items()}
    low, high = min(gain["low"], gain["high"]), max(gain["low"], gain["high"])
    figures = (
        f"{100 * gain['mean']:+.1f} points of exact match (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
        if generated
        else f"{gain['mean']:+.4f} nats of loss (95 % interval {low:+.4f} to {high:+.4f})"
    )
    against = "over one adapter with the same tokens"
    if high < 0:
        return [f"Routing each prompt to one of {k} experts loses {against}: {figures}.", "Verdict: keep one adapter."]
    if low <= 0:
        return [
            f"Routing to one of {k} experts makes no clear difference {against}: {figures}.",
            "Verdict: keep one adapter.",
        ]
    # The interval is of other prompts. Another training of the same rows is not in it.
    first = (
        f"Routing each prompt to one of {k} experts gains {figures} {against}. "
        "Whether other seeds agree: gradientspace compare CONFIG --seeds 3."
    )
    if not generated and not all(comparison[name] < 0 for name in ("token_loss", "domain_mean_token_loss")):
        return [first, "Verdict: undecided, the mean over tokens does not show the same gain as the mean over samples."]
    return [first, f"Verdict: split into {k}."]
