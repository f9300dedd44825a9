"""Pretrain a small Llama on plain text, so that the CPU's figures stand on a base that has learnt something.

    python benchmarks/base.py --out models/base-256 [--data ../shared/data] [--hidden-size 256] [--num-layers 6]
                              [--epochs 6] [--weight-decay 0.1] [--json PATH] [--quick]
    python benchmarks/base.py --rank models/base-256 models/base-320 ../shared/models/tiny-base

The first form trains one candidate: its own byte-level BPE of 4,096 tokens, documents packed into blocks, bf16
autocast, compiled (1.3 to 1.7 times as fast here), AdamW with a cosine, a held-out 2 % of the documents scored after
every epoch. It is checkpointed: killed and started again, it goes on. The second form ranks finished candidates, and
any other base, by their loss on the mix's `dev` rows. Tokenizers differ, so losses are nats a byte of text, not nats a
token. `test` is not read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import describe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from gradientspace.config import DataConfig, SourceConfig
from gradientspace.data import load, pad_batch

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
HELD_OUT = 0.02
"""Share of the documents that no candidate trains on; the same documents for every candidate."""


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Training and held-out documents, divided by a fixed seed."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    random.Random(0).shuffle(texts)
    n = max(1, int(len(texts) * HELD_OUT))
    return texts[n:], texts[:n]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, so that numbers are spelt one way only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def blocks_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Documents, each between its begin and end tokens, laid end to end and cut: (n, length) token ids."""
    ids = [i for row in tokenizer([BOS + text + EOS for text in texts])["input_ids"] for i in row]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Train one candidate into `options.out`; returns its record, which base.json holds too."""
    done = options.out / "base.json"
    if done.is_file():
        return json.loads(done.read_text())
    train, held_out = read_texts(options.data / "pretrain.jsonl")
    if options.quick:
        train, held_out = train[:400], held_out[:40]
    tokenizer = train_tokenizer(train, options.vocab_size)
    model = new_model(options, tokenizer)
    rows, judged = (blocks_of(texts, tokenizer, options.block_length) for texts in (train, held_out))
    held_out_bytes = sum(len(text.encode()) for text in held_out)
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens, {options.epochs} epochs", flush=True)
    scratch = options.out.with_name(options.out.name + ".partial")
    trainer = make_trainer(model, rows, judged, scratch, options)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(scratch)) if scratch.is_dir() else None)
    history = [h for h in trainer.state.log_history if "eval_loss" in h]
    record = {
        "parameters": model.num_parameters(),
        "settings": {key: value for key, value in vars(options).items() if key in SETTINGS},
        "training_tokens": rows.numel(),
        "held_out_nats_a_byte": [
            {"epoch": round(h["epoch"], 3), "loss": h["eval_loss"] * judged.numel() / held_out_bytes} for h in history
        ],
        "seconds_since_last_start": time.perf_counter() - start,
        "machine": describe("gradientspace", "transformers"),
    }
    finished = options.out.with_name(options.out.name + ".finished")
    model.to(torch.float32).save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    (finished / "base.json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(finished, options.out)
    shutil.rmtree(scratch)
    return record


SETTINGS = (
    "hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size", "block_length", "batch_size",
    "epochs", "learning_rate", "weight_decay", "attention_dropout", "seed",
)  # fmt: skip


def new_model(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    set_seed(options.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.num_heads,
            num_key_value_heads=options.num_heads,
            max_position_embeddings=1024,
            attention_dropout=options.attention_dropout,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_trainer(
    model: LlamaForCausalLM, rows: torch.Tensor, judged: torch.Tensor, scratch: Path, options: argparse.Namespace
) -> Trainer:
    """transformers' Trainer, a checkpoint every hundred steps, the held-out loss after every epoch."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # a value below one is a share of the steps
        weight_decay=options.weight_decay,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        bf16=True,
        torch_compile=options.compile,
        dataloader_drop_last=options.compile,  # one shape, compiled once
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=100,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=options.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row} for row in rows],  # pyright: ignore[reportArgumentType]
        eval_dataset=[{"input_ids": row} for row in judged],  # pyright: ignore[reportArgumentType]
        data_collator=next_token_batch,
        callbacks=[Lines()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def next_token_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


class Lines(TrainerCallback):
    """A line a log: step, losses and the time that is left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        done = state.global_step - self.first
        left = (time.perf_counter() - self.start) / max(1, done) * (state.max_steps - state.global_step)
        values = "  ".join(f"{key} {value:.4f}" for key, value in (logs or {}).items() if key in ("loss", "eval_loss"))
        if values:
            print(f"step {state.global_step}/{state.max_steps}  {values}  {left / 60:.0f} min left", flush=True)


@torch.inference_mode()
def dev_loss(folder: Path, data: Path, *, quick: bool) -> dict[str, Any]:
    """Loss of a base, without any adapter, on the completions of the mix's `dev` rows.

    Nats a byte of completion, its end token counted in the nats: overall, and the mean over rows of each row's own.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = SourceConfig(path=str(data / "mix/train.jsonl"), name="mix", limit=200 if quick else None)
    rows = load(DataConfig(train=[source], max_length=1024), tokenizer, seed=0)
    samples = sorted([*rows.dev_a, *rows.dev_b], key=lambda sample: len(sample.input_ids))
    sums: list[float] = []
    for start in range(0, len(samples), 32):
        batch = pad_batch(samples[start : start + 32], tokenizer.pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        sums += losses.sum(dim=1).tolist()
    sizes = [max(1, len(sample.reference.encode())) for sample in samples]
    return {
        "base": folder.name,
        "parameters": model.num_parameters(),
        "rows": len(samples),
        "nats_a_byte": sum(sums) / sum(sizes),
        "nats_a_byte_mean_over_rows": sum(s / n for s, n in zip(sums, sizes, strict=True)) / len(sums),
    }


def rank(options: argparse.Namespace) -> dict[str, Any]:
    rows = sorted((dev_loss(base, options.data, quick=options.quick) for base in options.rank), key=_by_loss)
    for row in rows:
        mean = row["nats_a_byte_mean_over_rows"]
        print(
            f"{row['base']:<16}{row['parameters']:>12,} parameters   {row['nats_a_byte']:.4f} nats a byte   "
            f"{mean:.4f} mean over {row['rows']} rows"
        )
    return {"dev": rows, "machine": describe("gradientspace", "transformers")}


def _by_loss(row: dict[str, Any]) -> float:
    return row["nats_a_byte"] if math.isfinite(row["nats_a_byte"]) else math.inf


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds pretrain.jsonl and mix/")
    parser.add_argument("--out", type=Path, default=Path("models/base"), help="folder of the finished candidate")
    parser.add_argument("--rank", type=Path, nargs="+", help="rank these bases by dev loss instead of training one")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=4, help="heads of 64 are 1.5 times as fast as heads of 32")
    parser.add_argument("--intermediate-size", type=int, help="default: 8/3 of the hidden size, in steps of 16")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="where there is no C++ compiler")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--quick", action="store_true", help="a smoke size, under a minute")
    options = parser.parse_args()
    if options.intermediate_size is None:
        options.intermediate_size = round(options.hidden_size * 8 / 3 / 16) * 16
    if options.quick:
        options.hidden_size, options.num_layers, options.intermediate_size, options.epochs = 64, 2, 128, 1
        options.num_heads, options.compile = 2, False
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    result = rank(options) if options.rank else pretrain(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
