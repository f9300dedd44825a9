"""Probabilities that mean what they say, and a fallback only where it pays. Arrays only; knows no encoder."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from gradientspace.errors import DataError

_LOG_TEMPERATURE = (np.log(1e-3), np.log(1e3))


def calibrated_probabilities(scores: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """`softmax(scores / temperature)`, (n, K) float64; with temperatures (K,), that of the row's best class."""
    return softmax(_scaled(scores, temperature), axis=1)


def negative_log_likelihood(scores: np.ndarray, labels: np.ndarray, temperature: float | np.ndarray = 1.0) -> float:
    """Mean of `-log p(label)` in nats. `scores`: (n, K), `labels`: (n,) in 0..K-1, `temperature`: one or (K,)."""
    log_p = log_softmax(_scaled(scores, temperature), axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())


def _scaled(scores: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    return scores / np.broadcast_to(temperature, scores.shape[1])[scores.argmax(axis=1)][:, None]


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the negative log-likelihood of held-out labels (Guo et al. 2017).

    As in Platt scaling (1999) a label counts as `1 - e` for its class and `e / (K - 1)` for each other one,
    with `e = 1 / (n + 2)`: where every held-out prompt is routed right, the plain optimum is temperature
    zero, that is certainty, which n prompts cannot show. Bounds: 0.001 to 1000. Without labels, or with one
    class: 1.
    """
    n, n_classes = scores.shape
    if n == 0 or n_classes == 1:
        return 1.0
    return _likeliest(scores, _smoothed(labels, n_classes))


def fit_temperatures(scores: np.ndarray, labels: np.ndarray, spread: float = 0.3) -> np.ndarray:
    """A temperature (K,) for the rows of each best class: sure classes and vague ones are not equally overconfident.

    No choice changes, since a row's scores are all divided by the same number. Few rows say little about a class, so
    the logarithm of its temperature has a normal prior of deviation `spread` around that of `fit_temperature`, and a
    class without rows keeps that one. Labels are smoothed as there. The default spread is that with the most likely
    labels on `dev` of the real mix (`benchmarks/routers.py`).
    """
    n_classes = scores.shape[1]
    common = fit_temperature(scores, labels)
    if n_classes == 1:
        return np.array([common])
    best, targets = scores.argmax(axis=1), _smoothed(labels, n_classes)
    rows = [best == k for k in range(n_classes)]
    return np.array([_likeliest(scores[r], targets[r], common, spread) if r.any() else common for r in rows])


def _smoothed(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Targets (n, K) of Platt's rule, for K > 1."""
    error = 1 / (len(labels) + 2)
    targets = np.full((len(labels), n_classes), error / (n_classes - 1))
    targets[np.arange(len(labels)), labels] = 1 - error
    return targets


def _likeliest(scores: np.ndarray, targets: np.ndarray, around: float = 1.0, spread: float = np.inf) -> float:
    """The temperature with the largest posterior: its prior is log-normal around a value, or flat."""
    scores = np.asarray(scores, np.float64)

    def loss(log_temperature: float) -> float:
        surprise = -(targets * log_softmax(scores / np.exp(log_temperature), axis=1)).sum()
        return float(surprise + ((log_temperature - np.log(around)) / spread) ** 2 / 2)

    # Convex in 1/temperature, hence with a single minimum in its logarithm.
    best = minimize_scalar(loss, bounds=_LOG_TEMPERATURE, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> float:
    """Mean distance between confidence and accuracy, in 0..1, over bins that hold equally many prompts.

    Prompts are sorted by the probability of their best class (ties in their order) and cut into `n_bins` bins
    whose sizes differ by at most one; the result is the mean of `|accuracy - mean confidence|` over bins,
    weighted by size. Equal-mass bins, since equal-width bins are mostly empty. With few prompts it is above
    zero even for a perfectly calibrated router. `probabilities`: (n, K), `labels`: (n,).
    """
    n = len(labels)
    if n == 0:
        raise DataError("the calibration error needs at least one prompt, got 0")
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == np.asarray(labels)
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, min(n_bins, n))
    return float(sum(abs(right[rows].mean() - confidence[rows].mean()) * len(rows) for rows in bins) / n)


@dataclass(frozen=True)
class ThresholdChoice:
    """A fallback threshold with its evidence: losses in nats, `coverage` the share still routed."""

    threshold: float
    coverage: float
    loss: float
    loss_without: float
    saving: float
    standard_error: float


def coverage_curve(
    probabilities: np.ndarray, expert_losses: np.ndarray, fallback_losses: np.ndarray, levels: int = 20
) -> list[ThresholdChoice]:
    """What each threshold would do: prompts whose best probability lies below it go to the fallback.

    `probabilities` and `expert_losses`: (n, K), the loss of every expert on every sample; `fallback_losses`:
    (n,). Thresholds are the 1/levels .. (levels-1)/levels quantiles of the best probability, duplicates once.
    """
    n, n_experts = probabilities.shape
    if np.shape(expert_losses) != (n, n_experts) or np.shape(fallback_losses) != (n,):
        raise DataError(
            f"a threshold needs losses of shape {(n, n_experts)} and {(n,)}, "
            f"got {np.shape(expert_losses)} and {np.shape(fallback_losses)}"
        )
    if not (np.isfinite(expert_losses).all() and np.isfinite(fallback_losses).all()):
        raise DataError("a threshold needs finite losses: leave out the samples without one")
    if n < 2:
        raise DataError(f"a threshold needs at least 2 samples, got {n}")
    confidence = probabilities.max(axis=1)
    routed = np.asarray(expert_losses, np.float64)[np.arange(n), probabilities.argmax(axis=1)]
    saved = routed - np.asarray(fallback_losses, np.float64)
    curve = []
    for threshold in np.unique(np.quantile(confidence, np.arange(1, levels) / levels)):
        saving = np.where(confidence < threshold, saved, 0.0)
        curve.append(
            ThresholdChoice(
                threshold=float(threshold),
                coverage=float((confidence >= threshold).mean()),
                loss=float(routed.mean() - saving.mean()),
                loss_without=float(routed.mean()),
                saving=float(saving.mean()),
                standard_error=float(saving.std(ddof=1) / np.sqrt(n)),
            )
        )
    return curve


def select_threshold(
    probabilities: np.ndarray,
    expert_losses: np.ndarray,
    fallback_losses: np.ndarray,
    levels: int = 20,
    alpha: float = 0.05,
) -> ThresholdChoice | None:
    """The threshold of `coverage_curve` with the lowest mean loss, or None where none is shown to help.

    The best of many thresholds lowers the loss of the samples it was chosen on almost always, by chance. So
    its saving must be above zero by a one-sided paired test at level `alpha`, divided by the number of
    thresholds tried (Bonferroni; their savings are strongly correlated, so this errs on the side of no
    fallback).
    """
    curve = coverage_curve(probabilities, expert_losses, fallback_losses, levels)
    best = max(curve, key=lambda choice: choice.saving)
    critical = NormalDist().inv_cdf(1 - alpha / len(curve))
    return best if best.saving > critical * best.standard_error else None
