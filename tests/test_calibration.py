import numpy as np
import pytest
from scipy.optimize import approx_fprime

from gradientspace.calibration import (
    Calibration,
    _Posterior,
    _smoothed,
    coverage_curve,
    expected_calibration_error,
    fit_calibration,
    fit_temperature,
    negative_log_likelihood,
    select_threshold,
)
from gradientspace.errors import DataError


def planted(n=2_000, n_classes=4, scale=1.0, seed=0):
    """Scores, and labels drawn from their softmax; the scores are then multiplied by `scale`."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.standard_normal((n, n_classes))
    return scale * scores, drawn(Calibration.none(n_classes).probabilities(scores), rng)


def drawn(p, rng):
    return (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)


def with_temperature(temperature, n_classes=4):
    return Calibration(np.full(n_classes, temperature), np.zeros(n_classes))


@pytest.mark.parametrize("scale", [0.2, 1.0, 8.0])
def test_the_planted_temperature_is_found_and_calibrates(scale):
    scores, labels = planted(scale=scale)
    temperature = fit_temperature(scores, labels)
    assert temperature == pytest.approx(scale, rel=0.1)
    before, after = (
        negative_log_likelihood(with_temperature(t).probabilities(scores), labels) for t in (1.0, temperature)
    )
    assert after <= before + 1e-6
    fresh, fresh_labels = planted(20_000, scale=scale, seed=1)
    assert expected_calibration_error(with_temperature(temperature).probabilities(fresh), fresh_labels) < 0.02


def test_calibration_does_not_change_the_choice():
    scores, labels = planted(scale=5.0)
    p = fit_calibration(scores, labels).probabilities(scores)
    np.testing.assert_array_equal(p.argmax(axis=1), scores.argmax(axis=1))
    np.testing.assert_allclose(p.sum(axis=1), 1)


def planted_by_class(seed):
    """Scores of rows that look like class 0 are four times too sharp; of the others they are right."""
    scores, labels = planted(3_000, seed=seed)
    return np.where((scores.argmax(axis=1) == 0)[:, None], 4 * scores, scores), labels


@pytest.mark.parametrize("noise_spread", [1.0, None])
def test_classes_of_different_sharpness_each_get_their_temperature(noise_spread):
    calibration = fit_calibration(*planted_by_class(0), noise_spread=noise_spread)
    assert calibration.temperatures == pytest.approx([4, 1, 1, 1], rel=0.2)
    assert calibration.noise.max() < 0.03
    scores, labels = planted_by_class(1)
    one = with_temperature(fit_temperature(*planted_by_class(0))).probabilities(scores)
    assert negative_log_likelihood(calibration.probabilities(scores), labels) < (
        negative_log_likelihood(one, labels) - 0.02
    )


@pytest.mark.parametrize("noise", [(0.0, 0.0, 0.0), (0.01, 0.05, 0.2), (0.1, 0.1, 0.1)])
def test_the_planted_noise_is_found_and_calibrates(noise):
    truth = Calibration(np.array([0.5, 1.0, 2.0]), np.array(noise))
    rng = np.random.default_rng(0)
    known, fresh = (4 * rng.standard_normal((n, 3)) for n in (3_000, 20_000))
    labels, fresh_labels = (drawn(truth.probabilities(scores), rng) for scores in (known, fresh))
    found = fit_calibration(known, labels, spread=1.0)
    assert found.noise == pytest.approx(noise, abs=0.03)
    assert found.temperatures == pytest.approx(truth.temperatures, rel=0.25)
    assert expected_calibration_error(found.probabilities(fresh), fresh_labels) < 0.015
    if noise[-1]:  # temperatures alone make sure rows too sure and the others too modest
        alone = fit_calibration(known, labels, spread=1.0, noise_spread=None)
        assert expected_calibration_error(alone.probabilities(fresh), fresh_labels) > 0.02


def test_the_slope_of_the_posterior_is_that_of_its_values():
    scores, labels = planted(50, n_classes=3)
    for noise_spread in (1.0, 0.3, None):
        posterior = _Posterior(scores, _smoothed(labels, 3), 0.3, noise_spread)
        for at in np.random.default_rng(0).normal(0, 1, (3, 8)):
            slope = approx_fprime(at, lambda v, f=posterior: f(v)[0], 1e-7)
            np.testing.assert_allclose(posterior(at)[1], slope, rtol=1e-3, atol=1e-3)


def test_few_rows_hardly_move_a_class_from_the_common_temperature():
    scores, labels = planted(2_000, n_classes=3)
    rare = np.flatnonzero(scores.argmax(axis=1) == 2)
    kept = np.setdiff1d(np.arange(2_000), rare[3:])
    wrong = np.where(np.isin(np.arange(2_000), rare), 0, labels)
    found = fit_calibration(scores[kept], wrong[kept]).temperatures
    common = np.sqrt(found[0] * found[1])
    assert common < found[2] < 1.5 * common  # three prompts, all wrong
    none = np.setdiff1d(kept, rare)
    found = fit_calibration(scores[none], labels[none]).temperatures
    assert min(found[:2]) <= found[2] <= max(found[:2])


def test_being_always_right_is_not_certainty():
    labels = np.arange(50) % 3
    scores = 5.0 * np.eye(3)[labels]
    p = with_temperature(fit_temperature(scores, labels), 3).probabilities(scores)
    assert p.max(axis=1) == pytest.approx(1 - 1 / 52, abs=1e-4)  # the rule of succession
    p = fit_calibration(scores, labels).probabilities(scores)
    assert p.max(axis=1) == pytest.approx(1 - 1 / 52, abs=5e-3)


def test_nothing_to_calibrate():
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1.0
    assert fit_temperature(np.zeros((5, 1)), np.zeros(5, int)) == 1.0
    for n, n_classes in ((0, 3), (5, 1)):
        found = fit_calibration(np.zeros((n, n_classes)), np.zeros(n, int))
        assert found.temperatures.tolist() == [1.0] * n_classes
        assert found.noise.tolist() == [0.0] * n_classes


def test_calibration_error_of_known_cases():
    sure, half = np.array([[1.0, 0.0]] * 4), np.array([[0.75, 0.25]] * 4)
    assert expected_calibration_error(sure, np.array([0, 0, 0, 0])) == 0
    assert expected_calibration_error(sure, np.array([1, 1, 1, 1])) == 1
    assert expected_calibration_error(half, np.array([0, 0, 0, 1]), n_bins=1) == 0
    # Two bins: 0.6 sure and always right, 0.9 sure and always wrong.
    mixed = np.array([[0.6, 0.4]] * 3 + [[0.9, 0.1]] * 3)
    assert expected_calibration_error(mixed, np.array([0, 0, 0, 1, 1, 1]), n_bins=2) == pytest.approx(0.65)
    with pytest.raises(DataError, match="at least one prompt"):
        expected_calibration_error(np.zeros((0, 2)), np.zeros(0))


def losses(n, unsure_cost, seed=0):
    """Two experts; where the router is unsure, its choice costs `unsure_cost` more than the fallback."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5, 1.0, n)
    fallback = rng.normal(2.0, 0.5, n)
    routed = fallback + rng.normal(-0.05, 0.1, n) + unsure_cost * (confidence < 0.6)
    return np.stack([confidence, 1 - confidence], axis=1), np.stack([routed, routed + 1], axis=1), fallback


def test_a_threshold_is_set_where_unsure_prompts_lose():
    p, expert_losses, fallback = losses(500, unsure_cost=0.5)
    choice = select_threshold(p, expert_losses, fallback)
    assert choice.threshold == pytest.approx(0.6, abs=0.03)
    assert choice.coverage == pytest.approx((p[:, 0] >= choice.threshold).mean())
    routed = np.where(p[:, 0] < choice.threshold, fallback, expert_losses[:, 0])
    assert choice.loss == pytest.approx(routed.mean())
    assert choice.loss_without - choice.loss == pytest.approx(choice.saving)
    assert choice.saving > 0


def test_no_threshold_where_none_helps_nor_where_it_is_luck():
    assert select_threshold(*losses(500, unsure_cost=0.0)) is None
    chosen = 0
    for seed in range(200):
        p, expert_losses, fallback = losses(200, unsure_cost=0.0, seed=seed)
        expert_losses += 0.05  # experts exactly level with the fallback, everywhere
        chosen += select_threshold(p, expert_losses, fallback) is not None
    assert chosen <= 18  # 5 % of 200, and chance above it


def test_losses_of_the_wrong_shape_or_not_finite_are_refused():
    p, expert_losses, fallback = losses(20, 0.0)
    with pytest.raises(DataError, match=r"\(20, 2\)"):
        coverage_curve(p, expert_losses[:, :1], fallback)
    with pytest.raises(DataError, match="finite"):
        coverage_curve(p, expert_losses, fallback * np.nan)
    with pytest.raises(DataError, match="at least 2"):
        coverage_curve(p[:1], expert_losses[:1], fallback[:1])
