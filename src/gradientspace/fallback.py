"""Who answers prompts that the router is unsure of: measured on dev_b, and set only where that lowers the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gradientspace.calibration import coverage_curve
from gradientspace.data import Sample
from gradientspace.files import write_json
from gradientspace.inference import BASE, Experts, expert_folders
from gradientspace.job import Job
from gradientspace.models import padding_id
from gradientspace.router import Router


def choose_fallback(job: Job, router: Router, folder: Path) -> None:
    """Give `router` the fallback of the config, with a threshold where one is shown to help; write `coverage.json`.

    The file has the coverage-quality curve: for every threshold the share of prompts still routed, the mean loss of
    dev_b in nats, and the saving with its standard error. An `error` has no loss of its own: it refuses the prompts
    that the shared adapter, or the base where there is none, would answer better.
    """
    kind = job.config.router.fallback
    assert kind != "none"
    stand_in = "base" if kind == "base" or job.config.experts.start != "shared" else "shared"
    experts = expert_folders(job.run.path / "experts")
    samples = job.data.dev_b
    expert_losses = np.stack([_losses(job, experts, k, samples) for k in range(len(experts))], axis=1)
    fallback = [job.run.path / "shared"] if stand_in == "shared" else []
    fallback_losses = _losses(job, fallback, 0 if fallback else BASE, samples)
    prompts = [sample.prompt for sample in samples]
    router.fallback = kind
    choice = router.select_threshold(prompts, expert_losses, fallback_losses)
    curve = coverage_curve(router.predict_proba(prompts), expert_losses, fallback_losses)
    write_json(
        folder / "coverage.json",
        {
            "split": "dev_b",
            "n": len(samples),
            "fallback": kind,
            "measured_against": stand_in,
            "threshold": None if choice is None else choice.threshold,
            "curve": [asdict(point) for point in curve],
        },
    )


def _losses(job: Job, folders: Sequence[Path], number: int, samples: Sequence[Sample]) -> np.ndarray:
    """(n,) loss of every sample under one adapter."""
    with Experts(job.base, folders) as experts:
        return experts.losses(
            samples, np.full(len(samples), number), pad_token_id=padding_id(job.tokenizer),
            batch_size=job.config.evaluation.per_device_eval_batch_size,
        )[0]  # fmt: skip
