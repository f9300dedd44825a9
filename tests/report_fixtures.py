"""A finished run made up from numbers, in no time and without a model: what the report reads, in the run's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace.config import GradientSpaceConfig
from gradientspace.conflict import FILE as GRAM_FILE
from gradientspace.conflict import write_gram
from gradientspace.data import Dataset, Sample
from gradientspace.evaluation import paired_bootstrap, summarise, verdict
from gradientspace.files import write_json
from gradientspace.rows import FILE as ROWS_FILE
from gradientspace.rows import write_rows
from gradientspace.run_folder import Run

TOPICS = ("bread oven", "comet orbit", "harbour boat", "ledger audit", "python loop", "rhyme verse")


def sample(i: int, prompt: str, answer: str, source: str) -> Sample:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Sample(f"id-{i}", prompt, [1, 2, 3, 4], [-100, -100, 3, 4], answer, source, source, i + 1, messages)


def made_up_run(
    folder: Path, n: int = 240, k: int = 3, *, hostile: str | None = None, evaluated: bool = True, seed: int = 0
) -> Run:
    """A run of `n` samples in `k` clusters. `hostile` is put into every text, name and label that data can bring."""
    random = np.random.default_rng(seed)
    values = {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "model": {"model_name_or_path": "a-model"},
        "data": {"train": [{"path": "train.jsonl"}]},
        "clustering": {"n_clusters": k},
    }
    run = Run.create(GradientSpaceConfig.from_dict(values))
    clusters = random.integers(0, k, n)
    clusters[:k] = np.arange(k)
    text = f" {hostile}" if hostile else ""
    sources = [f"source-{c % 3}{text}" for c in clusters]
    fit = [
        sample(i, f"{TOPICS[c % len(TOPICS)]} number {i}{text}", f"answer {i}{text}", s)
        for i, (c, s) in enumerate(zip(clusters.tolist(), sources, strict=True))
    ]
    test = [sample(n + i, f"{TOPICS[i % len(TOPICS)]} asked{text}", "yes", sources[i]) for i in range(60)]
    data = Dataset(fit, [], [], test, [], [], {})
    counts = {"rows": n, "kept": n, "lost": {}, "truncated": 0}
    run.stage("data", lambda to: write_json(to / "accounting.json", _accounting(counts, text)))
    run.stage("rows", lambda to: write_rows(to / ROWS_FILE, data), inputs=("data",))
    run.stage("warmup", lambda to: write_json(to / "training.json", _training(3)), inputs=("data",))
    run.stage("clustering", lambda to: _write_clustering(to, fit, clusters, k, random), inputs=("warmup",))
    for stage in ("shared", "single", *(f"experts/{j}" for j in range(k))):
        run.stage(stage, lambda to: write_json(to / "training.json", _training(4)), inputs=("warmup",))
    if evaluated:
        run.stage("evaluation", lambda to: _write_evaluation(to, run, test, k, random), inputs=("clustering",))
    return run


def _accounting(counts: dict[str, Any], text: str) -> dict[str, Any]:
    lost = {"duplicate": {"count": 2, "rows": [[3, 4]]}}
    file = {"split": "train", "source": f"mix{text}", "file": "train.jsonl", "mapping": None, "lost": lost,
            "rows": counts["rows"] + 2, "kept": counts["kept"], "truncated": {"count": 0, "rows": []}}  # fmt: skip
    tokens = {"tokens": 100, "supervised": 50, "longest": 9}
    return {
        "schema": 1,
        "files": [file],
        "totals": {"train": counts},
        "splits": {"fit": counts["kept"], "test": 60},
        "tokens": {"fit": tokens, "test": tokens},
        "near_duplicates": {"similarity": 0.7, "groups": 0, "rows": 0, "rows_of_templates": 0},
        "leaks": {"exact_prompts": 0, "ids": []},
        "renamed_ids": 0,
        "skipped_files": [],
        "warnings": [f"a warning{text}"],
    }


def _training(points: int) -> dict[str, Any]:
    losses = [{"step": 10 * (i + 1), "loss": 2.0 / (i + 1)} for i in range(points)]
    return {"samples": 10, "steps": 10 * points, "tokens": 100, "epochs": 1, "learning_rate": 1e-3, "losses": losses}


def _write_clustering(to: Path, fit: list[Sample], clusters: np.ndarray, k: int, random: np.random.Generator) -> None:
    centres = random.normal(size=(k, 8))
    z = (centres[clusters] + random.normal(size=(len(fit), 8))).astype(np.float32)
    margin = random.uniform(-0.1, 0.5, len(fit)).astype(np.float32)
    columns = {
        "id": [s.id for s in fit],
        "cluster": clusters,
        "cosine": random.uniform(0, 1, len(fit)).astype(np.float32),
        "margin": margin,
        "norm": random.uniform(1, 2, len(fit)).astype(np.float32),
        "loss": random.uniform(0, 3, len(fit)).astype(np.float32),
        "coordinates": pa.FixedSizeListArray.from_arrays(z.ravel(), 8),
        "near_boundary": margin < 0.05,
    }
    pq.write_table(pa.table(columns), to / "assignments.parquet")
    unit = z[:64] / np.linalg.norm(z[:64], axis=1, keepdims=True)
    write_gram(to / GRAM_FILE, [s.id for s in fit[:64]], unit @ unit.T)
    stability = {"mean": 0.9, "low": 0.8, "high": 1.0, "n_clusterings": 5}
    write_json(to / "clustering.json", {
        "n_clusters": k,
        "sizes": np.bincount(clusters, minlength=k).tolist(),
        "spectrum": {"estimate": None, "components": 8, "energy_of_components": 0.5,
                     "singular_values": np.linspace(4, 1, 20).tolist()},
        "stability": stability,
        "variance": {"total": 0.9, "within": 0.7, "between": 0.2},
    })  # fmt: skip


def _write_evaluation(to: Path, run: Run, test: list[Sample], k: int, random: np.random.Generator) -> None:
    domains = [s.domain or "" for s in test]
    losses = {m: random.uniform(1, 2, len(test)) + shift
              for m, shift in (("base", 1.0), ("single", 0.5), ("gradientspace", 0.2), ("oracle", 0.0))}  # fmt: skip
    tokens = np.full(len(test), 5)
    results: dict[str, Any] = {
        "schema": 1,
        "run": run.config.name,
        "split": "test",
        "domains": sorted(set(domains)),
        "methods": {m: summarise(v, tokens, domains) for m, v in losses.items()},
        "comparisons": {"gradientspace - single": {
            "loss": paired_bootstrap(losses["gradientspace"] - losses["single"], domains, draws=200),
            "token_loss": -0.3, "domain_mean_token_loss": -0.3,
        }},
        "clustering": {"n_clusters": k, "agreement": {"source": {"ari": 0.5, "nmi": 0.5, "purity": 0.7}}},
        "router": {"accuracy": 0.8, "calibration_error": 0.05, "regret": 0.02, "oracle_gap": 0.1},
        "experts": {"loss_by_domain": {d: random.uniform(1, 2, k).tolist() for d in sorted(set(domains))}},
    }  # fmt: skip
    results["verdict"] = verdict(results)
    write_json(to / "results.json", results)
    route = random.integers(0, k, len(test))
    columns = {"id": [s.id for s in test], "domain": domains, "source": domains, "cluster": route,
               "expert": np.where(random.uniform(size=len(test)) < 0.8, route, 0),
               "probability": random.uniform(1 / k, 1, len(test))}  # fmt: skip
    pq.write_table(pa.table({**columns, **{f"loss:{m}": v for m, v in losses.items()}}), to / "samples.parquet")
