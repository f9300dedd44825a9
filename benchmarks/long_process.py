"""Whether a long training keeps its speed: the same batches at its start and after hundreds of others.

    python benchmarks/long_process.py --json benchmarks/results/long-process.json      about a quarter of an hour
    python benchmarks/long_process.py --quick                                          a smoke size, under a minute

Steps of training (forward and backward of 16 rows) of a small base in bf16. Arms, each in a process of its own whose
memory starts without holes: batches as wide as their longest row with as many supervised positions as they have, and
both rounded up to sizes that repeat (`gradientspace.memory.repeated_size`). Memory is the resident set's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gradients import Sample, make_model
from machine import describe
from serving import SHAPES
from training import in_parts

import gradientspace.completion_loss
import gradientspace.data.collate
import gradientspace.gradients.head
from gradientspace.data import pad_batch
from gradientspace.memory import resident_bytes

ANY, REPEATED = "any size", "repeated sizes"
ROUNDING = (
    gradientspace.completion_loss,
    gradientspace.data.collate,
    gradientspace.gradients.head,
)
"""The modules that round sizes up."""
SHORTEST, LONGEST = 32, 384
WINDOW, BETWEEN = 20, 250
QUICK_WINDOW, QUICK_BETWEEN = 2, 4

Step = Callable[[random.Random], None]
"""Makes a batch from random numbers, and does its work."""


def lengths(numbers: random.Random, rows: int) -> list[int]:
    """Tokens of each row of a batch."""
    return [numbers.randint(SHORTEST, LONGEST) for _ in range(rows)]


@contextmanager
def training(shape: dict[str, int]) -> Iterator[Step]:
    size = {key: value for key, value in shape.items() if key not in ("vocab_size", "rank", "new_tokens")}
    model = make_model(size, vocabulary=shape["vocab_size"], device="cpu", dtype=torch.bfloat16)
    with in_parts()(model) as run:

        def step(numbers: random.Random) -> None:
            tokens = torch.Generator().manual_seed(numbers.getrandbits(32))
            samples = [Sample(n, numbers.randrange(n), tokens, shape["vocab_size"]) for n in lengths(numbers, 16)]
            run(pad_batch(samples, 0, longest=LONGEST))

        yield step


def timed(when: str, step: Step, batches: range) -> dict[str, float]:
    start = time.perf_counter()
    for number in batches:
        step(random.Random(number))
    seconds = time.perf_counter() - start
    return {f"{when}_seconds": seconds, f"{when}_resident_mb": resident_bytes() / 2**20}


def one_arm(arm: str, quick: bool) -> dict[str, float]:
    """In a process of its own: a window of batches, many others, and the window again."""
    if arm == ANY:
        for module in ROUNDING:
            module.repeated_size = int
    window, between = (QUICK_WINDOW, QUICK_BETWEEN) if quick else (WINDOW, BETWEEN)
    found: dict[str, float] = {}
    with training(SHAPES["demo" if quick else "tiny-base"]) as step:
        step(random.Random(-1))  # what is only done once
        found |= timed("early", step, range(window))
        found |= timed("between", step, range(window, window + between))
        found |= timed("late", step, range(window))
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    arms = {}
    for arm in (ANY, REPEATED):
        command = [sys.executable, __file__, "--one-arm", arm, "--threads", str(options.threads)]
        command += ["--quick"] if options.quick else []
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        arms[arm] = {**found, "late_over_early": found["late_seconds"] / found["early_seconds"]}
        print(
            f"{arm:15} {found['early_seconds']:6.1f} s early, {found['late_seconds']:6.1f} s late, "
            f"{found['early_resident_mb']:6.0f} MB early, {found['late_resident_mb']:6.0f} MB late",
            flush=True,
        )
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one-arm", choices=(ANY, REPEATED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.one_arm:
        print(json.dumps(one_arm(options.one_arm, options.quick)))
        return
    window, between = (QUICK_WINDOW, QUICK_BETWEEN) if options.quick else (WINDOW, BETWEEN)
    arms = measure(options)
    results = {"machine": describe("transformers", "peft"), "window": window, "between": between, "arms": arms}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
