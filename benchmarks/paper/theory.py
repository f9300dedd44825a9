"""The paper's theory, measured: Lemma 1, Theorem 2 and Theorem 3.

    python benchmarks/paper/theory.py runs/demo
    python benchmarks/paper/theory.py --quick            planted quadratics only

lemma1      total = within + between variance, in float64, by the definitions and not by each other
theorem2    how much lower the clusters' average variance is than the mixture's, on held-out gradients: clusters by the
            sample's own gradient, by the router from the prompt, and random groups of the same sizes
quadratics  Theorem 3 on planted quadratics: constant-step SGD ends at a noise floor eta S / (B (2 - eta)), with S the
            variance of the gradients it draws from; an expert's floor is lower and its transient longer
adapter     Theorem 3 on the run: constant-step SGD of the shared adapter, on each cluster and on the mixture
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, write_results
from constant_step import measure_adapter
from quadratics import measure_quadratics

from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.gradients import PerSampleGradients
from gradientspace.grouping import held_out
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.progress import Progress
from gradientspace.router import Router
from gradientspace.run_folder import Run

RANDOM_DRAWS = 20
IDENTITY_ROWS = 256
HELD_OUT_ROWS = 2000


def lemma1(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Variances of rows (n, D) float64 about their means, each by its definition, and how far the sum is off."""
    mean = rows.mean(axis=0)
    total = ((rows - mean) ** 2).sum() / len(rows)
    within = between = 0.0
    for k in np.unique(labels):
        members = rows[labels == k]
        centre = members.mean(axis=0)
        within += ((members - centre) ** 2).sum() / len(rows)
        between += len(members) / len(rows) * ((centre - mean) ** 2).sum()
    error = abs(total - within - between) / total
    return {"total": total, "within": within, "between": between, "relative_error": error}


class GroupSums:
    """Between-share of any number of groupings of a stream of rows: counts and float64 sums of every group."""

    def __init__(self, groupings: dict[str, np.ndarray], dim: int) -> None:
        self.groupings = groupings
        self.sums = {n: torch.zeros(int(g.max()) + 1, dim, dtype=torch.float64) for n, g in groupings.items()}
        self.squares, self.n = 0.0, 0

    def add(self, indices: torch.Tensor, rows: torch.Tensor) -> None:
        self.squares += float(rows.double().square().sum())
        self.n += len(rows)
        for name, labels in self.groupings.items():
            self.sums[name].index_add_(0, torch.as_tensor(labels[indices.numpy()]), rows.double())

    def reduction(self, name: str) -> float:
        """Between variance over total variance: the share by which the groups' average variance is lower."""
        counts = torch.as_tensor(np.bincount(self.groupings[name], minlength=len(self.sums[name]))).double()
        overall = self.sums[name].sum(dim=0)
        means = float((self.sums[name].square().sum(dim=1) / counts.clamp(min=1)).sum()) / self.n
        centre = float((overall / self.n).square().sum())
        return (means - centre) / (self.squares / self.n - centre)


def measure_gradients(run: Run, limit: int) -> dict[str, Any]:
    """Lemma 1 on the first rows and Theorem 2 on at most `limit` held-out rows of a run."""
    job = Job(run)
    samples = held_out(job.data)
    samples = [samples[i] for i in sorted(np.random.default_rng(0).permutation(len(samples))[:limit])]
    clusterer = OnlineSVDClusterer.load(run.path / "clustering")
    with (
        lora(job.base, job.config.lora, start=run.path / "warmup", seed=0) as model,
        PerSampleGradients(model) as engine,
    ):
        own = own_clusters(engine, clusterer, samples, job)
        usable = [s for s, k in zip(samples, own, strict=True) if k >= 0]
        own = own[own >= 0]
        router = Router.load(run.path / "router", job.encoder)
        shuffle = np.random.default_rng(1).permutation
        groupings = {"gradient": own, "routed": router.predict([s.prompt for s in usable])}
        groupings |= {f"random {i}": shuffle(own) for i in range(RANDOM_DRAWS)}
        sums = GroupSums(groupings, engine.dim)
        first = np.zeros((min(IDENTITY_ROWS, len(usable)), engine.dim))
        with Progress("held-out gradients", len(usable), "sample") as progress:
            for batch in engine.stream(usable, max_tokens=job.config.gradients.max_tokens_per_batch):
                units = batch.gradients / batch.norms[:, None]
                sums.add(batch.indices, units)
                early = batch.indices < len(first)
                first[batch.indices[early].numpy()] = units[early].double().numpy()
                progress.advance(len(batch.indices))
    chance = [sums.reduction(f"random {i}") for i in range(RANDOM_DRAWS)]
    k = int(own.max()) + 1
    return {
        "lemma1": lemma1(first, own[: len(first)]),
        "theorem2": {
            "n": len(usable),
            "n_clusters": k,
            "reduction": {name: sums.reduction(name) for name in ("gradient", "routed")},
            "random": {"mean": float(np.mean(chance)), "low": min(chance), "high": max(chance)},
            "expected_of_random": (k - 1) / (len(usable) - 1),
        },
    }


def own_clusters(engine: PerSampleGradients, clusterer: OnlineSVDClusterer, samples: list[Any], job: Job) -> np.ndarray:
    labels = np.full(len(samples), -1)
    for batch in engine.stream(samples, max_tokens=job.config.gradients.max_tokens_per_batch):
        labels[batch.indices.numpy()] = np.asarray(clusterer.predict(batch.gradients))
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", nargs="?", help="a finished run; without one, planted quadratics only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--sgd-steps", type=int, default=200, help="of the run's adapter on each cluster and the mixture; 0: none"
    )
    options = parser.parse_args()
    found: dict[str, Any] = {"quadratics": measure_quadratics(steps=2_000 if options.quick else 20_000)}
    if options.run:
        run = Run.open(options.run)
        found |= measure_gradients(run, limit=64 if options.quick else HELD_OUT_ROWS)
        if options.sgd_steps:
            found["adapter"] = measure_adapter(run, steps=6 if options.quick else options.sgd_steps)
        print(f"Lemma 1: off by {found['lemma1']['relative_error']:.1e} of the total")
        two = found["theorem2"]
        print(
            f"Theorem 2: variance {100 * two['reduction']['gradient']:.2f} % lower by gradient cluster, "
            f"{100 * two['reduction']['routed']:.2f} % by routed cluster, {100 * two['random']['mean']:.2f} % by chance"
        )
        for row in found.get("adapter", {"clusters": []})["clusters"]:
            print(f"Theorem 3, adapter: cluster {row['cluster']} noise {row['noise_ratio']:.3f} of the mixture's")
    for row in found["quadratics"]["clusters"]:
        print(f"Theorem 3, quadratics: floor {row['floor']:.4g}, predicted {row['predicted']:.4g}")
    write_results(options.json, {**found, "machine": describe("transformers", "peft")})


if __name__ == "__main__":
    main()
