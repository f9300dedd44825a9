"""What a training step costs, and the two things that make it cheap, in one run each.

    python benchmarks/training.py --json benchmarks/results/training.json
    python benchmarks/training.py --quick                          a smoke size, under a minute

head    lm_head on supervised positions only, against the Trainer's own step with all logits: forward and backward of
        the same batches, for two vocabularies and two shares of prompt
parts   batches of 16 rows of any length as a CPU works through them, whole and in parts of similar length, by the
        number of tokens of a part

Arms are interleaved. The optimiser, which takes the same time in all, is left out.
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
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gradients import MODEL, QUICK_MODEL, interleaved, make_batches, make_model, make_samples, summary
from machine import describe
from transformers import Trainer, TrainingArguments

from gradientspace import completion_loss
from gradientspace.completion_loss import CompletionTrainer
from gradientspace.data import pad_batch

ALL, ROWS = "all logits", "supervised rows"
WHOLE, PART_TOKENS = "whole batch", (512, 1024, 2048, 4096)
ROUNDS, QUICK_ROUNDS = 5, 2
STEP_TOKENS = 1_000
"""Supervised tokens that the loss of a step is divided by; any number takes the same time."""

Run = Callable[[dict[str, torch.Tensor]], None]
Arm = Callable[[Any], Any]


@contextmanager
def trainer_of(make: Callable[..., Trainer], model: Any, **options: Any) -> Iterator[Trainer]:
    cpu = next(model.parameters()).device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, use_cpu=cpu, report_to="none")
        yield make(model=model, args=arguments, **options)


ours = partial(trainer_of, CompletionTrainer, checkpoint_seconds=math.inf, made_from="")


def forward_and_backward(make_trainer: Callable[[Any], Any]) -> Arm:
    """An arm: on entry a trainer of the model, and then the loss and its gradient of a batch at once."""

    @contextmanager
    def arm(model: Any) -> Iterator[Run]:
        with make_trainer(model) as trainer:

            def run(batch: dict[str, torch.Tensor]) -> None:
                model.zero_grad()
                trainer.compute_loss(model, dict(batch), num_items_in_batch=STEP_TOKENS).backward()

            yield run

    return arm


def in_parts(max_tokens: int | None = None) -> Arm:
    """An arm: the trainer's own step, whose parts have at most so many tokens."""

    @contextmanager
    def arm(model: Any) -> Iterator[Run]:
        options = {} if max_tokens is None else {"max_tokens": max_tokens}
        cut = mock.patch.object(completion_loss, "parts", partial(completion_loss.parts, **options))
        with ours(model) as trainer, cut:
            trainer.create_optimizer()

            def run(batch: dict[str, torch.Tensor]) -> None:
                model.zero_grad()
                trainer.training_step(model, dict(batch), STEP_TOKENS)

            yield run

    return arm


HEAD = {ALL: forward_and_backward(partial(trainer_of, Trainer)), ROWS: forward_and_backward(ours)}
PARTS = {WHOLE: in_parts(10**9), **{f"{n} tokens": in_parts(n) for n in PART_TOKENS}}


def head(options: argparse.Namespace, vocabulary: int, prompt_share: float) -> dict[str, Any]:
    n, low, high = (12, 16, 64) if options.quick else (16, 32, 256)
    size = QUICK_MODEL if options.quick else MODEL
    model = make_model(size, vocabulary=vocabulary, device=options.device, dtype=torch.float32)
    samples = make_samples(n, low, high, prompt_share=prompt_share, vocabulary=vocabulary)
    batches = make_batches(samples, 2048, options.device)
    seconds = interleaved(model, HEAD, batches, QUICK_ROUNDS if options.quick else ROUNDS)
    return {"vocabulary": vocabulary, "prompt_share": prompt_share, "arms": summary(seconds, n, ALL)}


def parts(options: argparse.Namespace) -> dict[str, Any]:
    """Rows as they come: a group of a hundred is too small to be cut into batches of similar length."""
    n, low, high = (32, 16, 64) if options.quick else (96, 32, 384)
    model = make_model(QUICK_MODEL if options.quick else MODEL, device="cpu", dtype=torch.bfloat16)
    samples = make_samples(n, low, high)
    batches = [pad_batch(samples[i : i + 16], 0, longest=high) for i in range(0, n, 16)]
    tokens, cells = sum(len(s.input_ids) for s in samples), sum(batch["labels"].numel() for batch in batches)
    seconds = interleaved(model, PARTS, batches, QUICK_ROUNDS if options.quick else ROUNDS)
    return {"rows": 16, "lengths": [low, high], "padding": 1 - tokens / cells, "arms": summary(seconds, n, WHOLE)}


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
    results = {
        "machine": describe("transformers", "peft"),
        "model": QUICK_MODEL if options.quick else MODEL,
        "cells": [head(options, vocabulary, share) for vocabulary in vocabularies for share in (0.25, 0.75)],
        "parts": parts(options),
    }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
