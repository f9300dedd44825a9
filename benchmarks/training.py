"""A training step with lm_head on supervised positions only, against the Trainer's own with all logits.

    python benchmarks/training.py --json benchmarks/results/training.json
    python benchmarks/training.py --quick                          a smoke size, under a minute

Forward and backward of the same batches, arms interleaved in one run, for two vocabularies and two shares of prompt.
The optimiser, which takes the same time in both, is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gradients import MODEL, QUICK_MODEL, interleaved, make_batches, make_model, make_samples, summary
from machine import describe
from transformers import Trainer, TrainingArguments

from gradientspace.completion_loss import CompletionTrainer

ALL, ROWS = "all logits", "supervised rows"
ROUNDS, QUICK_ROUNDS = 5, 2


def steps(make: Callable[..., Trainer], **options: Any) -> Callable[[Any], Any]:
    """An arm: on entry a trainer of the model, and then forward and backward of a batch."""

    @contextmanager
    def arm(model: Any) -> Iterator[Callable[[dict[str, torch.Tensor]], None]]:
        with tempfile.TemporaryDirectory() as folder:
            cpu = next(model.parameters()).device.type == "cpu"
            trainer = make(
                model=model, args=TrainingArguments(output_dir=folder, use_cpu=cpu, report_to="none"), **options
            )

            def run(batch: dict[str, torch.Tensor]) -> None:
                model.zero_grad()
                trainer.compute_loss(model, dict(batch), num_items_in_batch=1_000).backward()  # type: ignore[union-attr]

            yield run

    return arm


ARMS = {ALL: steps(Trainer), ROWS: steps(CompletionTrainer, checkpoint_seconds=math.inf, made_from="")}


def measure(options: argparse.Namespace, vocabulary: int, prompt_share: float) -> dict[str, Any]:
    n, low, high = (12, 16, 64) if options.quick else (16, 32, 256)
    size = QUICK_MODEL if options.quick else MODEL
    model = make_model(size, vocabulary=vocabulary, device=options.device, dtype=torch.float32)
    samples = make_samples(n, low, high, prompt_share=prompt_share, vocabulary=vocabulary)
    batches = make_batches(samples, 2048, options.device)
    seconds = interleaved(model, ARMS, batches, QUICK_ROUNDS if options.quick else ROUNDS)
    return {"vocabulary": vocabulary, "prompt_share": prompt_share, "arms": summary(seconds, n, ALL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    vocabularies = (512,) if options.quick else (8_192, 32_768)
    cells = [measure(options, vocabulary, share) for vocabulary in vocabularies for share in (0.25, 0.75)]
    model = QUICK_MODEL if options.quick else MODEL
    results = {"machine": describe("transformers", "peft"), "model": model, "cells": cells}
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
