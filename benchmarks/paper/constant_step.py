"""Theorem 3 on real adapters: constant-step SGD from a run's shared adapter, on each cluster and on the mixture.

Near where the shared adapter ended, the noise of a step is the variance of the gradients it is drawn from, over the
batch size. `noise` is that variance, measured on the gradients that SGD drew; `own_gradient` the squared norm of the
gradient of the cluster's own objective, averaged over the second half of the steps, for SGD on the cluster and for SGD
on the mixture with the same step, batch and number of steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gradientspace.data import Sample, pad_batch
from gradientspace.gradients import PerSampleGradients
from gradientspace.grouping import Groups
from gradientspace.job import Job
from gradientspace.models import lora, padding_id
from gradientspace.progress import Progress
from gradientspace.run_folder import Run

STEP = 0.05
BATCH = 8
PROBE = 64
PROBES = 5


def measure_adapter(run: Run, steps: int) -> dict[str, Any]:
    job, groups = Job(run), Groups.read(run.path / "clustering")
    everything = [s for members in groups.members(job.data.fit) for s in members]
    probes = [_draw(members, PROBE, seed=k) for k, members in enumerate(groups.members(job.data.fit))]
    noise, mixture = descend(job, everything, probes, steps, seed=0)
    rows = []
    for k, members in enumerate(groups.members(job.data.fit)):
        own_noise, (own,) = descend(job, members, [probes[k]], steps, seed=1 + k)
        rows.append(
            {
                "cluster": k,
                "samples": len(members),
                "noise": own_noise,
                "noise_ratio": own_noise / noise,
                "own_gradient": own,
                "own_gradient_of_mixture": mixture[k],
            }
        )
    weights = np.array([row["samples"] for row in rows]) / sum(row["samples"] for row in rows)
    return {
        "step": STEP,
        "batch": BATCH,
        "steps": steps,
        "mixture_noise": noise,
        "average_noise_ratio": float(weights @ [row["noise_ratio"] for row in rows]),
        "clusters": rows,
    }


def descend(
    job: Job, samples: list[Sample], probes: list[list[Sample]], steps: int, seed: int
) -> tuple[float, list[float]]:
    """SGD from the experts' start. Returns the variance of drawn gradients, and each probe's mean squared gradient."""
    generator = np.random.default_rng(seed)
    watched = set(np.linspace(steps // 2, steps - 1, PROBES, dtype=int).tolist())
    spread: list[float] = []
    seen: list[list[float]] = [[] for _ in probes]
    with (
        lora(job.base, job.config.lora, start=job.expert_start, seed=0) as model,
        PerSampleGradients(model, self_check=False) as engine,
        Progress("constant-step SGD", steps, "step") as progress,
    ):
        for t in range(steps):
            drawn = [samples[i] for i in generator.integers(len(samples), size=BATCH)]
            rows = engine.compute(pad_batch(drawn, padding_id(job.tokenizer)))
            mean = rows.mean(dim=0)
            # The unbiased variance of one draw; a batch of B has 1 / B of it.
            spread.append(float((rows - mean).square().sum()) / (BATCH - 1))
            if t in watched:
                for probe, values in zip(probes, seen, strict=True):
                    gradient = engine.compute(pad_batch(probe, padding_id(job.tokenizer))).mean(dim=0)
                    values.append(float(gradient.square().sum()))
            _step(engine, mean)
            progress.advance()
    return float(np.mean(spread)), [float(np.mean(values)) for values in seen]


@torch.no_grad()
def _step(engine: PerSampleGradients, gradient: torch.Tensor) -> None:
    for block, parameter in zip(engine.layout, engine.parameters(), strict=True):
        part = gradient[block.offset : block.offset + block.size].reshape(block.shape)
        parameter -= STEP * part.to(parameter)


def _draw(members: list[Sample], n: int, seed: int) -> list[Sample]:
    rows = np.random.default_rng(seed).permutation(len(members))[:n]
    return [members[i] for i in rows]
