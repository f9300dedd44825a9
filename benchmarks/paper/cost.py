"""What answering costs: one routed expert, an ensemble of all experts, and ELREA with its gradient for every prompt.

    python benchmarks/paper/cost.py runs/real-mix-seed0        a run whose baselines include elrea

All in one process on the same prompts, one at a time as a server gets them; medians over prompts, after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import describe, write_results

from gradientspace.baselines import baseline_arm, elrea
from gradientspace.ensemble import ensemble_answers, ensemble_losses
from gradientspace.gradients import PerSampleGradients
from gradientspace.inference import Experts, expert_folders
from gradientspace.job import Job
from gradientspace.models import lora, padding_id
from gradientspace.projection import SparseProjection
from gradientspace.router import Router
from gradientspace.run_folder import Run

PROMPTS = 24
NEW_TOKENS = 32
WARM = 3


def milliseconds(call: Callable[[int], object], n: int) -> float:
    """Median time of `call(i)` for i < n."""
    for i in range(min(WARM, n)):
        call(i)
    times = []
    for i in range(n):
        start = time.perf_counter()
        call(i)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(run: Run, n: int) -> dict[str, Any]:
    job = Job(run)
    samples = job.data.dev_b[:n]
    n = len(samples)
    arm = baseline_arm(job, elrea.NAME)
    folders = expert_folders(run.path / "experts")
    router = Router.load(run.path / "router", job.encoder)
    # Another prompt every time: the encoder remembers texts that it has seen.
    route = milliseconds(lambda i: router.predict_proba([f"{samples[i].prompt} {i}"]), n)
    found = {
        "gradientspace": {"decide_ms": route, **answering(job, folders, samples, ensemble=False)},
        "weighted-ensemble": {"decide_ms": route, **answering(job, folders, samples, ensemble=True)},
        "elrea": {
            "decide_ms": gradient_ms(job, arm.adapters[0], samples),
            **answering(job, arm.adapters, samples, True),
        },
    }
    for row in found.values():
        row["answer_ms"] = row["decide_ms"] + row["generate_ms"]
    return {"prompts": n, "new_tokens": NEW_TOKENS, "methods_cost": found}


def answering(job: Job, folders: list[Path], samples: list[Any], ensemble: bool) -> dict[str, Any]:
    """Passes a token, and milliseconds for the loss of a sample and for `NEW_TOKENS` greedy tokens."""
    pad = padding_id(job.tokenizer)
    even, first = np.full((1, len(folders)), 1 / len(folders)), np.zeros(1, dtype=int)
    with Experts(job.base, folders) as experts:
        if ensemble:
            loss = milliseconds(
                lambda i: ensemble_losses(experts, [samples[i]], [even], batch_size=1, pad_token_id=pad), len(samples)
            )
            generate = milliseconds(
                lambda i: ensemble_answers(
                    experts, [samples[i].prompt_ids], even, batch_size=1, pad_token_id=pad,
                    max_new_tokens=NEW_TOKENS, stop_ids=[],
                ),
                len(samples),
            )  # fmt: skip
        else:
            loss = milliseconds(
                lambda i: experts.losses([samples[i]], first, batch_size=1, pad_token_id=pad), len(samples)
            )
            generate = milliseconds(
                lambda i: experts.generate(
                    [samples[i].prompt_ids], first, job.tokenizer, batch_size=1, max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS, do_sample=False,
                ),
                len(samples),
            )  # fmt: skip
    return {"passes_per_token": len(folders) if ensemble else 1, "loss_ms": loss, "generate_ms": generate}


def gradient_ms(job: Job, adapter: Path, samples: list[Any]) -> float:
    """A prompt's gradient and its projection."""
    with (
        lora(job.base, job.config.lora, start=adapter, seed=0) as model,
        PerSampleGradients(model, self_check=False) as engine,
    ):
        project = SparseProjection(engine.dim, elrea.WIDTH, seed=0)
        instructions = [elrea.instruction_of(s) for s in samples]
        return milliseconds(
            lambda i: [project(b.gradients) for b in engine.stream([instructions[i]], shuffle=False)], len(samples)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4 prompts")
    options = parser.parse_args()
    found = measure(Run.open(options.run), 4 if options.quick else PROMPTS)
    for name, row in found["methods_cost"].items():
        print(
            f"{name:18} passes {row['passes_per_token']}   decide {row['decide_ms']:7.1f} ms   "
            f"loss {row['loss_ms']:7.1f} ms   {NEW_TOKENS} tokens {row['generate_ms']:7.1f} ms"
        )
    write_results(options.json, {**found, "machine": describe("transformers", "peft")})


if __name__ == "__main__":
    main()
