"""Metrics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gradientspace.evaluation import (
    agreement,
    paired_bootstrap,
    summarise,
    variance_shares,
    verdict,
)


def test_summary_by_hand() -> None:
    result = summarise(np.array([1.0, 3.0, 5.0]), np.array([1, 3, 2]), ["a", "a", "b"], np.array([1.0, 0.0, 1.0]))
    assert result["overall"]["loss"] == 3.0
    assert result["overall"]["token_loss"] == pytest.approx((1 + 9 + 10) / 6)
    assert result["overall"]["domain_mean_token_loss"] == pytest.approx((10 / 4 + 5) / 2)
    assert result["by_domain"]["a"] == {
        "loss": 2.0,
        "token_loss": 2.5,
        "perplexity": np.exp(2.5),
        "n": 2,
        "exact_match": 0.5,
    }
    assert "exact_match" not in summarise(np.ones(1), np.ones(1), ["a"])["overall"]


def test_agreement_leaves_out_excluded_samples() -> None:
    assert agreement(np.array([0, 0, 1, 1, -1]), ["x", "x", "y", "y", "x"]) == {
        "ari": 1.0,
        "nmi": 1.0,
        "purity": 1.0,
    }
    assert agreement(np.array([0, 0, 0, 1]), ["x", "x", "y", "y"])["purity"] == 0.75


def test_bootstrap_covers_the_mean_and_shrinks_with_strata() -> None:
    values = np.array([0.0] * 50 + [10.0] * 50)
    strata = ["low"] * 50 + ["high"] * 50
    within = paired_bootstrap(values, strata)
    assert within == {"mean": 5.0, "low": 5.0, "high": 5.0}  # no variance inside a stratum
    across = paired_bootstrap(values, ["all"] * 100)
    assert across["low"] < 4.2 < 5.8 < across["high"]


def test_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 400)
    interval = paired_bootstrap(values, ["a"] * 400)
    half_width = 1.96 * values.std() / 20
    assert interval["high"] - interval["low"] == pytest.approx(2 * half_width, rel=0.05)


def test_law_of_total_variance() -> None:
    generator = np.random.default_rng(0)
    units = generator.normal(size=(60, 7)) + np.repeat(np.eye(3, 7) * 2, 20, axis=0)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    labels = np.repeat([0, 1, 2], 20)
    shares = variance_shares(np.bincount(labels), np.stack([units[labels == k].sum(axis=0) for k in range(3)]))
    assert shares["total"] == pytest.approx(units.var(axis=0).sum(), abs=1e-12)
    within = np.mean([units[labels == k].var(axis=0).sum() for k in range(3)])
    assert shares["within"] == pytest.approx(within, abs=1e-12)


@pytest.mark.parametrize(
    ("interval", "answer"),
    [
        ({"mean": 0.1, "low": 0.05, "high": 0.15}, "split into 4"),
        ({"mean": -0.1, "low": -0.15, "high": -0.05}, "keep one adapter"),
        ({"mean": 0.01, "low": -0.05, "high": 0.06}, "keep one adapter"),
    ],
)
def test_verdict_follows_the_interval(interval: dict, answer: str) -> None:
    results = {
        "clustering": {"n_clusters": 4},
        "comparisons": {"gradientspace - single": {"exact_match": interval}},
    }
    assert answer in verdict(results)[1]


def test_verdict_with_one_cluster() -> None:
    results = {"clustering": {"n_clusters": 1}, "comparisons": {"gradientspace - single": {"loss": {}}}}
    assert verdict(results)[1] == "Verdict: keep one adapter."


def test_a_gain_in_loss_needs_the_same_sign_per_token() -> None:
    loss = {"mean": -0.1, "low": -0.15, "high": -0.05}
    for token_loss, answer in ((-0.1, "split into 2"), (0.1, "undecided")):
        comparison = {"loss": loss, "token_loss": token_loss, "domain_mean_token_loss": -0.1}
        results = {"clustering": {"n_clusters": 2}, "comparisons": {"gradientspace - single": comparison}}
        lines = verdict(results)
        assert answer in lines[1]
        assert "+0.1000 nats of loss (95 % interval +0.0500 to +0.1500)" in lines[0]
