"""The clusters of the real mix by 1, 2 and 4 processes, given the same order; beside it the agreement of two seeds.

    python benchmarks/distributed.py --rows 1200 --json benchmarks/results/distributed.json

Each arm is one `gradientspace cluster` (target plain) under torchrun over gloo, one thread a process, with the same
warm-up adapter. `--rows` takes the first rows of the training file only, and the result says how many were clustered.
`seconds` are of the whole stage; processes that share cores do not get faster, so they say what the exchange costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from machine import describe
from sklearn.metrics import adjusted_rand_score

from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.distributed import WORK, serve
from gradientspace.gradients import PerSampleGradients
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.online_pass import gather
from gradientspace.pipeline import run
from gradientspace.ranks import ranks
from gradientspace.run_folder import Run

CHECKED = 48
"""Samples whose gradients from all processes are compared with one process's own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/real-mix.yaml")
    parser.add_argument("--rows", type=int, help="rows of the training file; default: all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sync-every", type=int, nargs="+", default=[0, 256])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="150 rows, 1 and 2 processes")
    parser.add_argument("--arm", nargs=3, metavar=("FOLDER", "NAME", "SYNC_EVERY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.processes, options.sync_every = 150, [1, 2], [64]
    if options.arm:
        work_on_arm(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def config_of(options: argparse.Namespace, folder: str, name: str, sync_every: int, seed: int) -> GradientSpaceConfig:
    config = load_config(options.config)
    if options.rows:
        config.data.train[0].limit, config.data.test[0].limit = options.rows, 40
    config.name, config.output_dir, config.seed = name, folder, seed
    config.clustering.target, config.clustering.sync_every = "plain", sync_every
    config.data.n_validation = min(config.data.n_validation, 256)
    config.model.device = "cpu"
    return config


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    warm = run(config_of(options, str(scratch), "warm", 0, 0), until="warmup")
    arms, first = [], {}
    for sync_every in options.sync_every:
        for n in options.processes:
            name = f"{n}-processes-{sync_every}"
            launch(options, scratch, n, name, sync_every)
            labels = labels_of(scratch / name)
            first.setdefault(sync_every, (labels, clustering_bytes(scratch / name)))
            arms.append(
                {
                    "processes": n,
                    "sync_every": sync_every,
                    "ari_to_first": ari(labels, first[sync_every][0]),
                    "equal_bytes_to_first": clustering_bytes(scratch / name) == first[sync_every][1],
                    "ari_to_sync_every_batch": ari(labels, first[options.sync_every[0]][0]),
                    "largest_relative_gradient_error": json.loads((scratch / f"{name}.json").read_text()),
                    "seconds": Run.open(scratch / name).costs()["clustering"]["seconds"],
                }
            )
            print(arms[-1], file=sys.stderr, flush=True)
    other = run(config_of(options, str(scratch), "other-seed", options.sync_every[0], 1), until="cluster")
    return {
        "arms": arms,
        "seed_to_seed_ari": ari(labels_of(other.path), first[options.sync_every[0]][0]),
        "clustered_rows": len(first[options.sync_every[0]][0]),
        "rows_of_the_training_file": options.rows or "all",
        "dimension": json.loads((scratch / name / "clustering/clustering.json").read_text())["dimension"],
        "n_clusters": warm.config.clustering.n_clusters,
        "machine": describe("transformers", "peft"),
    }


def launch(options: argparse.Namespace, scratch: Path, n: int, name: str, sync_every: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone"]
    command += [__file__, "--config", options.config, "--arm", str(scratch), name, str(sync_every)]
    command += ["--rows", str(options.rows)] if options.rows else []
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


def work_on_arm(options: argparse.Namespace) -> None:
    """One process of an arm: the stage itself, then the gradients of a few samples once more."""
    folder, name, sync_every = options.arm
    here = ranks()
    if here.rank:
        WORK["check"] = check
        serve()
        return
    warm = Run.open(Path(folder) / "warm")
    with here.leading():
        job = Job(run(config_of(options, folder, name, int(sync_every), 0), until="cluster", lenders=[warm]))
        here.order("check", job.run)
        error = check(job)
    (Path(folder) / f"{name}.json").write_text(json.dumps(error))


def check(job: Job) -> float | None:
    """Largest |g - g'| / |g'| between what rank 0 is sent and what it computes itself; None on the others."""
    samples = job.data.fit[:CHECKED]
    with (
        lora(job.base, job.config.lora, start=job.run.path / "warmup", seed=0) as model,
        PerSampleGradients(model) as engine,
    ):
        sent = {
            int(i): g for b in gather(engine, samples, job.config) for i, g in zip(b.indices, b.gradients, strict=True)
        }
        if ranks().rank:
            return None
        limit = job.config.gradients.max_tokens_per_batch
        own = engine.stream(samples, max_tokens=limit, seed=job.config.seed)
        errors = [
            torch.linalg.vector_norm(sent[int(i)] - g) / torch.linalg.vector_norm(g)
            for b in own
            for i, g in zip(b.indices, b.gradients, strict=True)
        ]
    return float(max(errors))


def labels_of(folder: Path) -> dict[str, int]:
    table = pq.read_table(folder / "clustering/assignments.parquet", columns=["id", "cluster"])
    return dict(zip(table["id"].to_pylist(), table["cluster"].to_pylist(), strict=True))


def ari(one: dict[str, int], two: dict[str, int]) -> float:
    """Adjusted Rand index over the rows that both have clustered."""
    both = [i for i in one if i in two]
    return float(adjusted_rand_score(np.array([one[i] for i in both]), np.array([two[i] for i in both])))


def clustering_bytes(folder: Path) -> dict[str, bytes]:
    files = (p for p in (folder / "clustering").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


if __name__ == "__main__":
    main()
