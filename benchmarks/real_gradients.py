"""Unit gradients of real samples as few columns: the noise of the planted settings that has a real gradient's shape.

    python benchmarks/real_gradients.py --out runs/real-noise
    python benchmarks/clustering.py --real runs/real-noise

Warms an adapter up on `examples/real-mix.yaml`, takes the gradients of random rows that it has not seen, and writes
an exact isometry of the unit gradients: rows.npy (N, N) with the same inner products, which is all that clustering,
and a Gaussian random projection in distribution, ever see; adam.npy, the same of gradients divided by the root of
their second moment, as Adam's step would; and domains.json. Gradients are kept in a file while they are made, so that a
killed call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from gradientspace.config import load_config
from gradientspace.gradients import PerSampleGradients
from gradientspace.job import Job
from gradientspace.models import lora, padding_id
from gradientspace.pipeline import run

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 192  # tokens; short rows keep this to minutes on two cores


def gradients_of(job: Job, samples: list, store: Path) -> torch.Tensor:
    """(N, D) unit gradients."""
    start = job.run.path / "warmup"
    with lora(job.base, job.config.lora, start=start, seed=0) as model, PerSampleGradients(model) as engine:
        gradients, pad = torch.zeros(len(samples), engine.dim), padding_id(job.tokenizer)
        for batch in engine.stream(samples, max_tokens=4096, seed=0, pad_token_id=pad, store=store):
            gradients[batch.indices] = batch.gradients / batch.norms[:, None]
    return gradients


def unit_gram(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, N) cosines, in float64, of rows whose columns are multiplied by `scale` (D,)."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block, factor in zip(rows.split(8192, dim=1), scale.split(8192), strict=True):
        block = block * factor
        gram += (block @ block.T).double()
    lengths = gram.diagonal().sqrt()
    return gram / lengths / lengths[:, None]


def isometry(gram: torch.Tensor) -> np.ndarray:
    """Rows (N, N) float32 whose inner products are `gram`."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()).float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and what it gives")
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_config(ROOT / "examples/real-mix.yaml", ["--output_dir", str(options.out), "--name", "warmup"])
    for source in [*config.data.train, *config.data.test]:
        source.path = str((ROOT / source.path).resolve())
    config.model.model_name_or_path = str((ROOT / config.model.model_name_or_path).resolve())
    if not Path(config.model.model_name_or_path).is_dir():
        sys.exit(f"skipped: {config.model.model_name_or_path} does not exist, and real gradients need that model")
    job = Job(run(config, until="warmup"))
    seen = {sample.id for sample in job.data.warmup}
    pool = [s for s in job.data.fit if s.id not in seen and len(s.input_ids) <= LONGEST]
    chosen = np.random.default_rng(0).permutation(len(pool))[: options.n]
    samples = [pool[i] for i in chosen]
    gradients = gradients_of(job, samples, options.out / "gradients.safetensors")
    np.save(options.out / "rows.npy", isometry(unit_gram(gradients, torch.ones(gradients.shape[1]))))
    np.save(options.out / "adam.npy", isometry(unit_gram(gradients, 1.0 / (gradients.square().mean(0).sqrt() + 1e-8))))
    (options.out / "domains.json").write_text(json.dumps([s.domain for s in samples]))
    print(f"{options.out}: {len(chosen)} of {len(pool)} rows of at most {LONGEST} tokens")


if __name__ == "__main__":
    main()
