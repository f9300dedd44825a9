"""The pilot: one adapter against K routed experts, from the same start, with the same total steps, on dev."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradientspace.data import Sample
from gradientspace.diagnosis.candidates import Candidate
from gradientspace.evaluation import paired_bootstrap
from gradientspace.files import write_json
from gradientspace.inference import Experts
from gradientspace.job import Job
from gradientspace.models import padding_id


@dataclass(frozen=True)
class CommonStart:
    """The adapter in `folder` that every arm goes on from, and the rows and passes that are left for the arms."""

    folder: Path
    inputs: tuple[str, ...]
    rows: list[Sample]
    epochs: float
    shared_first: bool

    def train(self, job: Job, name: str, rows: list[Sample]) -> Path:
        """Stage: one arm's adapter, trained on `rows`; without any it stays at the common start."""
        if not rows:
            return self.folder
        return job.train(name, lambda: rows, epochs=self.epochs, start=self.folder, inputs=self.inputs)


def common_start(job: Job) -> CommonStart:
    """As in the method, what all rows share is learnt first from all of them."""
    first, second, epochs = _rows(job)
    warmup = job.run.path / "warmup"
    if not first:
        return CommonStart(warmup, ("evidence", "warmup"), second, epochs, shared_first=False)
    shared = job.train("pilot/shared", lambda: first, epochs=epochs, start=warmup, inputs=("evidence", "warmup"))
    return CommonStart(shared, ("evidence", "pilot/shared"), second, epochs, shared_first=True)


def train_single(job: Job, start: CommonStart) -> Path:
    """One adapter on everything."""
    return start.train(job, "pilot/single", start.rows)


def run_pilot(job: Job, candidate: Candidate) -> dict[str, Any]:
    """Train both arms and compare them on dev."""
    start = common_start(job)
    single = train_single(job, start)
    labels = candidate.route(job.encoder.encode([s.prompt for s in start.rows]))
    experts = [
        start.train(job, f"pilot/experts/{k}", [s for s, g in zip(start.rows, labels, strict=True) if g == k])
        for k in range(candidate.n_groups)
    ]
    trained = tuple(s for s in job.run.manifest()["stages"] if s.startswith("pilot/") and s != "pilot/result")
    folder = job.run.stage(
        "pilot/result", lambda to: _compare(job, candidate, single, experts, start.shared_first, to), inputs=trained
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
    one, tokens = losses(job, [single], dev, np.zeros(len(dev), dtype=int))
    many, _ = losses(job, experts, dev, candidate.route(job.encoder.encode([s.prompt for s in dev])))
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


def losses(job: Job, adapters: list[Path], samples: list[Sample], routed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss (n,) of every sample under the adapter `routed` (n,) names, and its supervised tokens (n,)."""
    with Experts(job.base, adapters) as arm:
        return arm.losses(
            samples, routed, batch_size=job.config.evaluation.per_device_eval_batch_size,
            pad_token_id=padding_id(job.tokenizer),
        )  # fmt: skip
