"""The dry run: every stage of a run has an estimate, nothing is left behind, and totals add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import micro_values

from gradientspace import preflight
from gradientspace.config import GradientSpaceConfig
from gradientspace.run_folder import Run
from gradientspace.training import optimiser_steps

pytestmark = pytest.mark.e2e


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PROBE_SECONDS", 0.3)


def test_every_stage_has_an_estimate_and_nothing_is_left(quick, finished_run: Run, tmp_path: Path) -> None:
    config = GradientSpaceConfig.from_dict(finished_run.config.to_dict() | {"output_dir": str(tmp_path / "runs")})
    estimates = preflight.estimate(config)
    assert not (tmp_path / "runs").exists()
    names = [e.stage for e in estimates]
    assert names == [
        "data", "warmup", "cluster", "shared", "experts (2)", "router", "single", "random (2)", "embedding (2)",
        "evaluation",
    ]  # fmt: skip
    assert all(e.seconds > 0 and e.peak_bytes > 2**20 for e in estimates)
    experts = next(e for e in estimates if e.stage == "experts (2)")
    folders = [finished_run.path / f"experts/{k}" for k in range(2)]
    on_disk = sum(p.stat().st_size for f in folders for p in f.iterdir() if p.suffix == ".safetensors")
    assert on_disk <= experts.disk_bytes <= on_disk + 2**20
    trained = [json.loads((f / "training.json").read_text()) for f in folders]
    steps = int(experts.detail.split(" steps")[0])
    assert abs(steps - sum(t["steps"] for t in trained)) <= 2, "equal groups end with other short batches"
    assert experts.detail.endswith(f" {sum(t['tokens'] for t in trained):,} tokens")
    assert preflight.table(estimates).splitlines()[-1].startswith("all")


def test_every_baseline_and_way_to_answer_costs_something(quick, micro_model, micro_mix, tmp_path: Path) -> None:
    from typing import get_args

    from gradientspace.config import Baseline, InferenceMode

    values = micro_values(micro_model, micro_mix, tmp_path)
    job = preflight.Job(Run(tmp_path / "none", GradientSpaceConfig.from_dict(values).validate()))
    rates = preflight.probe(job)
    few = {e.stage: e for e in preflight.add_up(job, rates)}
    job.config.evaluation.baselines = list(get_args(Baseline))
    job.config.evaluation.inference_modes = list(get_args(InferenceMode))
    many = {e.stage: e for e in preflight.add_up(job, rates)}
    assert {name.split(" (")[0] for name in many} >= set(get_args(Baseline))
    assert many["evaluation"].seconds > few["evaluation"].seconds
    assert many["single-long"].seconds > many["single-wide"].seconds > 0
    assert {name: e.seconds for name, e in many.items() if name in ("warmup", "cluster", "shared")} == {
        name: few[name].seconds for name in ("warmup", "cluster", "shared")
    }


def test_other_ways_of_grouping_take_no_gradients(quick, micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["clustering"] = {"method": "random", "n_clusters": 2, "target": "plain"}
    values["experts"] = {"start": "warmup"}
    values["evaluation"] = {"baselines": []}
    estimates = {e.stage: e for e in preflight.estimate(GradientSpaceConfig.from_dict(values))}
    assert "shared" not in estimates
    assert estimates["cluster"].seconds == 0


def test_steps_are_counted_as_the_trainer_counts_them(micro_model: Path, tmp_path: Path) -> None:
    from micro_training import TRAINING, Micro

    micro = Micro(micro_model, n=21)
    for options, epochs in (
        ({}, 1.5),
        ({"gradient_accumulation_steps": 4}, 2.0),
        ({"per_device_train_batch_size": 5}, 0.7),
    ):
        summary = micro.train(tmp_path / "a", epochs=epochs, options=options)
        assert summary.steps == optimiser_steps(21, replace(TRAINING, **options), epochs)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (59, "59 s"), (95, "1 min 35 s"), (3599.6, "1 h 00 min"), (7300, "2 h 01 min")],
)
def test_times_read_well(seconds: float, text: str) -> None:
    assert preflight.format_seconds(seconds) == text
