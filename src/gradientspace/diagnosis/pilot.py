"""The pilot: one adapter against K routed experts, from the same start, with the same total steps, on dev."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradientspace.data import Sample
from gradientspace.diagnosis.candidates import Candidate
from gradientspace.evaluation import paired_bootstrap
from gradientspace.inference import Experts
from gradientspace.job import Job
from gradientspace.models import padding_id
from gradientspace.run_folder import write_json


def run_pilot(job: Job, candidate: Candidate) -> dict[str, Any]:
    """Train both arms and compare them on dev. As in the method, what all share is learnt first from all rows."""
    first, second, epochs = _rows(job)
    warmup = job.run.path / "warmup"
    start, inputs = warmup, ("evidence", "warmup")
    if first:
        start = job.train("pilot/shared", lambda: first, epochs=epochs, start=warmup, inputs=inputs)
        inputs = ("evidence", "pilot/shared")
    single = job.train("pilot/single", lambda: second, epochs=epochs, start=start, inputs=inputs)
    labels = candidate.route(job.encoder.encode([s.prompt for s in second]))
    experts = []
    for k in range(candidate.n_groups):
        members = [s for s, label in zip(second, labels, strict=True) if label == k]
        # A group that the pilot's rows do not have stays at the common start.
        experts.append(
            job.train(f"pilot/experts/{k}", lambda m=members: m, epochs=epochs, start=start, inputs=inputs)
            if members
            else start
        )
    trained = tuple(s for s in job.run.manifest()["stages"] if s.startswith("pilot/") and s != "pilot/result")
    folder = job.run.stage(
        "pilot/result", lambda to: _compare(job, candidate, single, experts, bool(first), to), inputs=trained
    )
    return json.loads((folder / "pilot.json").read_text())


def _rows(job: Job) -> tuple[list[Sample], list[Sample], float]:
    """Rows of the shared phase (none unless experts start shared), rows of both arms, and passes over them."""
    training, steps = job.config.training, job.config.diagnosis.pilot_steps
    needed = steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    order = np.random.default_rng(job.config.seed).permutation(len(job.data.fit))[:needed]
    rows = [job.data.fit[i] for i in order.tolist()]
    epochs = needed / len(rows)
    if job.config.experts.start != "shared":
        return [], rows, epochs
    half = len(rows) // 2
    return rows[:half], rows[half:], epochs


def _compare(job: Job, candidate: Candidate, single: Path, experts: list[Path], shared: bool, folder: Path) -> None:
    dev = [*job.data.dev_a, *job.data.dev_b]
    options = {
        "batch_size": job.config.evaluation.per_device_eval_batch_size,
        "pad_token_id": padding_id(job.tokenizer),
    }
    with Experts(job.base, [single]) as arm:
        one, tokens = arm.losses(dev, np.zeros(len(dev), dtype=int), **options)
    routed = candidate.route(job.encoder.encode([s.prompt for s in dev]))
    with Experts(job.base, experts) as arm:
        many, _ = arm.losses(dev, routed, **options)
    strata = [s.domain or s.source or "" for s in dev]
    write_json(folder / "pilot.json", {
        "grouping": candidate.name,
        "n_groups": candidate.n_groups,
        "steps": job.config.diagnosis.pilot_steps,
        "shared_first": shared,
        "n_dev": len(dev),
        "loss_one_adapter": float(one.mean()),
        "loss_routed_experts": float(many.mean()),
        "difference": paired_bootstrap(many - one, strata, seed=job.config.seed),
        "token_difference": float(np.average(many - one, weights=tokens)),
    })  # fmt: skip
