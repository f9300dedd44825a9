"""A fallback is measured on dev_b, and set only where it lowers the loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import micro_values

from gradientspace import fallback
from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import ConfigError
from gradientspace.grouping import Groups
from gradientspace.job import Job
from gradientspace.router import Router
from gradientspace.run_folder import Run


def config(finished_run: Run, kind: str) -> GradientSpaceConfig:
    values = finished_run.config.to_dict()
    return GradientSpaceConfig.from_dict({**values, "router": {**values["router"], "fallback": kind}})


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["shared", "base", "error"])
def test_the_curve_is_written_and_the_router_remembers(finished_run: Run, tmp_path: Path, kind: str) -> None:
    job = Job(Run(finished_run.path, config(finished_run, kind)))
    router = Router.load(finished_run.path / "router")
    fallback.choose_fallback(job, router, tmp_path)
    router.save(tmp_path)
    coverage = json.loads((tmp_path / "coverage.json").read_text())
    assert coverage["n"] == len(job.data.dev_b)
    assert coverage["measured_against"] == ("base" if kind == "base" else "shared")
    shares = [point["coverage"] for point in coverage["curve"]]
    assert shares == sorted(shares, reverse=True)
    assert coverage["threshold"] is None or coverage["threshold"] in [p["threshold"] for p in coverage["curve"]]
    loaded = Router.load(tmp_path)
    assert (loaded.fallback, loaded.threshold) == (kind, coverage["threshold"])


@pytest.mark.e2e
def test_a_router_is_calibrated_on_all_of_dev_that_nothing_is_chosen_or_judged_on(finished_run: Run) -> None:
    job = Job(finished_run)
    ids = [sample.id for sample in [*job.data.dev_a, *job.data.dev_b]]
    assert [sample.id for sample in job.calibrated_on()] == ids
    clusters = Groups.read(finished_run.path / "clustering").held_out[: len(ids)]
    assert Router.load(finished_run.path / "router").n_calibration_ == (clusters >= 0).sum()
    for section, option, value in (("router", "fallback", "base"), ("evaluation", "split", "dev_b")):
        values = finished_run.config.to_dict()
        values[section][option] = value
        job = Job(Run(finished_run.path, GradientSpaceConfig.from_dict(values)))
        assert [sample.id for sample in job.calibrated_on()] == ids[: len(job.data.dev_a)]


@pytest.mark.e2e
def test_a_threshold_is_set_where_experts_are_bad_at_what_the_router_is_unsure_of(
    finished_run: Run, tmp_path: Path, monkeypatch
) -> None:
    job = Job(Run(finished_run.path, config(finished_run, "shared")))
    router = Router.load(finished_run.path / "router")
    confidence = router.predict_proba([sample.prompt for sample in job.data.dev_b]).max(axis=1)
    unsure = confidence < np.median(confidence)

    def losses(job, folders, number, samples):
        is_fallback = folders and folders[0].name == "shared"
        return np.full(len(samples), 2.0) if is_fallback else np.where(unsure, 3.0, 1.0)

    monkeypatch.setattr(fallback, "_losses", losses)
    fallback.choose_fallback(job, router, tmp_path)
    assert router.threshold is not None
    assert min(confidence) < router.threshold <= np.median(confidence) + 1e-12


def test_a_shared_fallback_needs_a_shared_adapter(micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values |= {"router": {"fallback": "shared"}, "experts": {"start": "warmup"}}
    with pytest.raises(ConfigError, match=r"router\.fallback=shared needs experts\.start=shared"):
        GradientSpaceConfig.from_dict(values).validate()
