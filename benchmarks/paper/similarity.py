"""Fig. 4: similarity of embeddings against similarity of gradients, on 500 sentence pairs of the STS benchmark.

    python benchmarks/paper/similarity.py runs/real-mix-seed0 --pairs ../shared/data/similarity/stsb.test.jsonl

A sentence's gradient is that of its own tokens with an empty prompt, at the run's warm-up adapter, in full dimension.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, write_results
from scipy.stats import pearsonr, spearmanr

from gradientspace.gradients import PerSampleGradients
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.progress import Progress
from gradientspace.run_folder import Run

PAIRS = 500
SEED = 0
BATCH = 8  # pairs


@dataclass(frozen=True)
class Sentence:
    input_ids: list[int]

    @property
    def labels(self) -> list[int]:
        return self.input_ids


def chosen_pairs(path: Path, n: int) -> list[dict[str, Any]]:
    """`n` pairs, the same ones every time."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return random.Random(SEED).sample(rows, min(n, len(rows)))


def gradient_similarities(job: Job, pairs: list[dict[str, Any]]) -> list[float]:
    """Cosine of the full gradients of both sentences of each pair."""
    start = [job.tokenizer.bos_token_id] if job.tokenizer.bos_token_id is not None else []

    def sentence(text: str) -> Sentence:
        return Sentence([*start, *job.tokenizer(text, add_special_tokens=False)["input_ids"]])

    cosines: list[float] = []
    warm = job.run.require("warmup", "warmup")
    with (
        lora(job.base, job.config.lora, start=warm, seed=0) as model,
        PerSampleGradients(model) as engine,
        Progress("pairs", len(pairs), "pair") as progress,
    ):
        for first in range(0, len(pairs), BATCH):
            batch = pairs[first : first + BATCH]
            sentences = [sentence(pair[side]) for pair in batch for side in ("sentence1", "sentence2")]
            rows = torch.zeros(len(sentences), engine.dim)
            for part in engine.stream(sentences, shuffle=False):
                rows[part.indices] = part.gradients.cpu()
            rows = torch.nn.functional.normalize(rows, dim=1)
            cosines += (rows[::2] * rows[1::2]).sum(dim=1).tolist()
            progress.advance(len(batch))
    return cosines


def measure(run: Run, path: Path, n: int) -> dict[str, Any]:
    job, pairs = Job(run), chosen_pairs(path, n)
    first, second = (job.encoder.encode([pair[side] for pair in pairs]) for side in ("sentence1", "sentence2"))
    columns = {
        "score": [pair["score"] for pair in pairs],
        "embedding": (first * second).sum(axis=1).tolist(),
        "gradient": gradient_similarities(job, pairs),
    }
    correlations = {
        f"{a} with {b}": {
            "pearson": float(pearsonr(columns[a], columns[b])[0]),
            "spearman": float(spearmanr(columns[a], columns[b])[0]),
        }
        for a, b in (("embedding", "score"), ("gradient", "score"), ("gradient", "embedding"))
    }
    rounded = {name: np.round(values, 5).tolist() for name, values in columns.items()}
    return {"n": len(pairs), "correlations": correlations, "pairs": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="a run folder with a warm-up adapter")
    parser.add_argument("--pairs", type=Path, required=True, help="jsonl with sentence1, sentence2, score")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="32 pairs")
    options = parser.parse_args()
    found = measure(Run.open(options.run), options.pairs, 32 if options.quick else PAIRS)
    for name, values in found["correlations"].items():
        print(f"{name:24} Pearson {values['pearson']:+.3f}   Spearman {values['spearman']:+.3f}")
    write_results(options.json, {**found, "machine": describe("transformers", "peft")})


if __name__ == "__main__":
    main()
