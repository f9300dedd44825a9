"""Warm-up on a slice, then the gradients of a sample: only their inner products, losses and labels are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from gradientspace.clustering.rank import estimate_rank
from gradientspace.clustering.svd import gradient_svd
from gradientspace.conflict import read_gram, unit_gram, write_gram
from gradientspace.data import Sample
from gradientspace.errors import DataError
from gradientspace.files import write_json
from gradientspace.gradients import PerSampleGradients
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.progress import Progress, say

_SLICE = 500
"""Rows of the warm-up split that the warm-up takes at most."""
_FEWEST = 40
_NULL_DRAWS = 20
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Survey:
    """A sample of n rows of `fit` outside the warm-up, in random order.

    `gram` (n, n) inner products of uncentred unit gradients (NaN for a row without one), `losses` (n,) nats under the
    warm-up adapter, `embeddings` (n, e) of the prompts, `rank` the estimate of K with its evidence.
    """

    samples: list[Sample]
    gram: np.ndarray
    losses: np.ndarray
    embeddings: np.ndarray
    rank: dict

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions with a gradient: the reference half, on which everything is fitted, and the probe half."""
        usable = np.flatnonzero(np.isfinite(np.diagonal(self.gram)))
        return usable[: len(usable) // 2], usable[len(usable) // 2 :]

    @property
    def sources(self) -> list[str]:
        return [s.source or "" for s in self.samples]


def survey_gradients(job: Job) -> Survey:
    """Stages `warmup` and `survey`."""
    options = job.config.warmup
    job.train(
        "warmup", lambda: job.data.warmup[:_SLICE], epochs=options.num_train_epochs, start=None, inputs=("data",),
        learning_rate=options.learning_rate,
    )  # fmt: skip
    folder = job.run.stage("survey", lambda to: _measure(job, to), inputs=("warmup",))
    ids, gram = read_gram(folder / "gram.parquet")
    record = json.loads((folder / "survey.json").read_text())
    by_id = {s.id: s for s in job.data.fit}
    samples = [by_id[i] for i in ids]
    embeddings = job.encoder.encode([s.prompt for s in samples])
    return Survey(samples, gram, np.array(record["losses"]), embeddings, record["rank"])


def _measure(job: Job, folder: Path) -> None:
    config = job.config
    with (
        lora(job.base, config.lora, start=job.run.path / "warmup", seed=config.seed) as model,
        PerSampleGradients(model) as engine,
    ):
        samples = _draw(job, engine.dim)
        gradients, losses = torch.zeros(len(samples), engine.dim), np.full(len(samples), np.nan)
        with Progress("gradients", len(samples), "sample") as progress:
            for batch in engine.stream(samples, max_tokens=config.gradients.max_tokens_per_batch, seed=config.seed):
                gradients[batch.indices] = batch.gradients.cpu()
                losses[batch.indices.numpy()] = batch.losses.cpu().numpy()
                progress.advance(len(batch.indices))
    write_gram(folder / "gram.parquet", [s.id for s in samples], unit_gram(gradients))
    generator = torch.Generator().manual_seed(config.seed)
    half = gradients[: len(samples) // 2]
    svd = gradient_svd(half, 1, center=config.clustering.center, n_draws=_NULL_DRAWS, generator=generator)
    rank = estimate_rank(svd, k_min=config.clustering.k_min, k_max=config.clustering.k_max, generator=generator)
    write_json(folder / "survey.json", {"losses": np.nan_to_num(losses).tolist(), "rank": rank.to_dict()})


def _draw(job: Job, dim: int) -> list[Sample]:
    """`diagnosis.n_samples` random rows of `fit` outside the warm-up, fewer where memory does not hold them."""
    asked = job.config.diagnosis.n_samples
    room = int(_MEMORY_SHARE * psutil.virtual_memory().available / (4 * dim))
    warm = {s.id for s in job.data.warmup}
    rest = [s for s in job.data.fit if s.id not in warm]
    n = min(asked, room, len(rest))
    if n < _FEWEST:
        raise DataError(
            f"{n} rows are too few for a diagnosis, which needs {_FEWEST} outside the warm-up: give more rows"
            + (", or free some memory" if room < _FEWEST else "")
        )
    if n < asked:
        say(f"  {n} rows instead of {asked}: {'memory holds no more' if n == room else 'fit has no more'}")
    order = np.random.default_rng(job.config.seed).permutation(len(rest))[:n]
    return [rest[i] for i in order.tolist()]
