"""Baselines of one adapter on the whole mix: as large as an expert, as large as all of them, as long as all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from gradientspace.arm import Arm
from gradientspace.config import LoraConfig
from gradientspace.grouping import held_out
from gradientspace.job import Job
from gradientspace.models import lora, save_adapter


def train_single(job: Job) -> Path:
    """Stage `single`: one adapter on all of `fit`, from the experts' start, for the experts' epochs."""
    return job.train(
        "single",
        lambda: job.data.fit,
        epochs=job.expert_epochs,
        start=job.expert_start,
        inputs=job.start_stages,
        served=True,
    )


def train_single_long(job: Job) -> Path:
    """One adapter with K times the tokens of any other arm, shared phase included: what compute alone buys."""
    total = job.config.training.num_train_epochs * n_experts(job)
    return job.train(
        "baselines/single-long/adapter",
        lambda: job.data.fit,
        epochs=total - job.shared_epochs,
        start=job.expert_start,
        inputs=("clustering", *job.start_stages),
    )


def train_single_wide(job: Job) -> Path:
    """One adapter of rank K r, with as many numbers as all experts together.

    It starts as the very function that the experts start from: the start's A and B are padded with fresh rows of A
    and zero columns of B, and alpha / r stays what it is.
    """
    narrow, k = job.config.lora, n_experts(job)
    wide = dataclasses.replace(narrow, lora_r=narrow.lora_r * k, lora_alpha=narrow.lora_alpha * k)
    start = job.run.stage(
        "baselines/single-wide/start",
        lambda folder: widen(job, wide, folder),
        inputs=("clustering", *job.start_stages),
    )
    return job.train(
        "baselines/single-wide/adapter",
        lambda: job.data.fit,
        epochs=job.expert_epochs,
        start=start,
        inputs=("baselines/single-wide/start",),
        shape=wide,
    )


def widen(job: Job, wide: LoraConfig, folder: Path) -> None:
    """Write the experts' start, padded to the rank of `wide`."""
    with lora(job.base, wide, start=None, seed=job.config.seed) as model:
        if job.expert_start is not None:
            narrow = load_file(job.expert_start / "adapter_model.safetensors")
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                # PEFT leaves the adapter's name out of the file.
                weights = narrow[name.replace(".default.", ".")].to(parameter.device, parameter.dtype)
                with torch.no_grad():
                    # A is (r, inputs) and B (outputs, r): either way the start fills the first r of its rank.
                    parameter[: weights.shape[0], : weights.shape[1]] = weights
        save_adapter(model, folder, job.config.model)


def n_experts(job: Job) -> int:
    return json.loads((job.run.path / "clustering/clustering.json").read_text())["n_clusters"]


TRAIN: dict[str, Callable[[Job], Path]] = {"single-wide": train_single_wide, "single-long": train_single_long}


def arm(job: Job, name: str) -> Arm:
    return one_adapter(job, job.run.path / f"baselines/{name}/adapter")


def one_adapter(job: Job, folder: Path) -> Arm:
    """An arm that answers everything with the adapter in `folder`."""
    return Arm([folder], np.zeros(len(held_out(job.data)), dtype=int), [*job.shared_stage, folder])
