"""Probabilities that mean what they say, and a fallback only where it pays. Arrays only; knows no encoder."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from gradientspace.errors import DataError

_LOG_TEMPERATURE = (np.log(1e-3), np.log(1e3))
_NOISE_LOGIT, _NOISE_LOGIT_SPREAD = -4.0, 1.0  # 1.8 %, 0.7 to 4.7 within one deviation


@dataclass(frozen=True)
class Calibration:
    """From scores to probabilities: `(1 - noise) * softmax(scores / temperature) + noise / K`.

    `temperatures`, `noise`: (K,), a row's are those of its best class. Noise is the share of rows, in 0..1, whose class
    is not what their scores say, however clearly they do. Neither changes which class is best.
    """

    temperatures: np.ndarray
    noise: np.ndarray

    @classmethod
    def none(cls, n_classes: int) -> Calibration:
        """Probabilities that are the softmax of the scores."""
        return cls(np.ones(n_classes), np.zeros(n_classes))

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """(n, K) scores -> (n, K) float64; rows sum to one."""
        scores = np.asarray(scores, np.float64)
        best = scores.argmax(axis=1)
        temperature, noise = self.temperatures[best][:, None], self.noise[best][:, None]
        return (1 - noise) * softmax(scores / temperature, axis=1) + noise / scores.shape[1]


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `-log p(label)` in nats. `probabilities`: (n, K), `labels`: (n,) in 0..K-1."""
    with np.errstate(divide="ignore"):  # a label that was held to be impossible costs infinitely much
        return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


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
    scores, targets = np.asarray(scores, np.float64), _smoothed(labels, n_classes)

    def loss(log_temperature: float) -> float:
        return -(targets * log_softmax(scores / np.exp(log_temperature), axis=1)).sum()

    # Convex in 1/temperature, hence with a single minimum in its logarithm.
    best = minimize_scalar(loss, bounds=_LOG_TEMPERATURE, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x))


def fit_calibration(
    scores: np.ndarray, labels: np.ndarray, spread: float = 0.3, noise_spread: float | None = 1.0
) -> Calibration:
    """A temperature and a share of noise for each best class: sure and vague classes are not equally overconfident.

    `scores`: (n, K), `labels`: (n,), smoothed as in `fit_temperature`. Maximum a posteriori, since few rows say little
    about a class: the logarithm of its temperature has a normal prior of deviation `spread` around a common one, which
    is free; the logit of its noise one of deviation `noise_spread` around a common one, whose own prior has the median
    1.8 %. A class without rows keeps the common ones. Without `noise_spread` there is no noise. The defaults are chosen
    by the likelihood of labels on `dev` (`benchmarks/routers.py`).
    """
    n, n_classes = scores.shape
    if n == 0 or n_classes == 1:
        return Calibration.none(n_classes)
    posterior = _Posterior(np.asarray(scores, np.float64), _smoothed(labels, n_classes), spread, noise_spread)
    start = np.zeros((2, n_classes + 1))
    start[:, 0] = np.log(fit_temperature(scores, labels)), _NOISE_LOGIT
    found = minimize(
        posterior, start.ravel(), jac=True, method="L-BFGS-B", options={"ftol": 1e-12},
        bounds=[_LOG_TEMPERATURE, *[(-5, 5)] * n_classes, *[(-15, 5)] * (n_classes + 1)],
    ).x  # fmt: skip
    return Calibration(*posterior.unpack(found))


class _Posterior:
    """Minus the log posterior of a common log temperature, each class's deviation from it (K), and the same of the
    noise's logit: 2 K + 2 numbers, as a matrix (2, K + 1)."""

    def __init__(self, scores: np.ndarray, targets: np.ndarray, spread: float, noise_spread: float | None) -> None:
        self.scores, self.targets, self.best = scores, targets, scores.argmax(axis=1)
        self.with_noise = noise_spread is not None
        self.mean, self.precision = np.zeros((2, 2, scores.shape[1] + 1))
        self.precision[0, 1:] = spread**-2
        if noise_spread is not None:
            self.mean[1, 0] = _NOISE_LOGIT
            self.precision[1] = noise_spread**-2
            self.precision[1, 0] = _NOISE_LOGIT_SPREAD**-2

    def unpack(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Temperatures and noise, each (K,)."""
        common, deviations = np.split(at.reshape(2, -1), [1], axis=1)
        temperatures, noise = np.exp(common[0] + deviations[0]), expit(common[1] + deviations[1])
        return temperatures, noise if self.with_noise else np.zeros_like(noise)

    def __call__(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient (2 K + 2,); `by_x` is the derivative of the rows' surprise by x."""
        n_classes = self.scores.shape[1]
        temperatures, noise = (values[self.best][:, None] for values in self.unpack(at))
        scaled = self.scores / temperatures
        clear = softmax(scaled, axis=1)
        p = np.maximum((1 - noise) * clear + noise / n_classes, np.finfo(np.float64).tiny)
        by_p = -self.targets / p
        by_score = (1 - noise) * clear * (by_p - (by_p * clear).sum(axis=1, keepdims=True))
        by_temperature = -(by_score * scaled).sum(axis=1)
        by_noise = (noise * (1 - noise) * by_p * (1 / n_classes - clear)).sum(axis=1)
        slopes = [np.bincount(self.best, rows, minlength=n_classes) for rows in (by_temperature, by_noise)]
        gradient = np.array([[slope.sum(), *slope] for slope in slopes])
        off = at.reshape(2, -1) - self.mean
        value = -(self.targets * np.log(p)).sum() + (self.precision * off**2).sum() / 2
        return float(value), (gradient + self.precision * off).ravel()


def _smoothed(labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Targets (n, K) of Platt's rule, for K > 1."""
    error = 1 / (len(labels) + 2)
    targets = np.full((len(labels), n_classes), error / (n_classes - 1))
    targets[np.arange(len(labels)), labels] = 1 - error
    return targets


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
