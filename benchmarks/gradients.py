"""How fast, how exact and how large: per-sample LoRA gradients, ours and everybody else's, in one run.

    python benchmarks/gradients.py [--json PATH] [--quick] [--sections speed,prompts,...] [--device cuda]

Sections
    speed      every arm on the same model and batches, interleaved; error against batch size one; peak memory
    prompts    the gain from lm_head on supervised positions only, by share of prompt tokens
    packing    padded against packed batches on short mixed lengths
    stream     peak memory of a stream of one thousand and of ten thousand samples
    precision  the error of bf16 weights against fp32
opacus and bergson take part where they are installed (bergson brings a torchvision that does not fit torch's CPU build:
uninstall it there). Memory is the growth of the resident set (or of the
GPU's allocations) over what the loaded model takes, each arm in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gradient_rivals import ARMS, Run, engine, loop, matrix
from machine import describe
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gradientspace.data import pad_batch
from gradientspace.gradients import PerSampleGradients
from gradientspace.gradients.batching import plan_batches

MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
QUICK_MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 8192
ROUNDS, QUICK_ROUNDS = 7, 2


class Sample:
    """Random tokens; the first `prompt` of them are not supervised."""

    def __init__(self, length: int, prompt: int, generator: torch.Generator, vocabulary: int) -> None:
        self.input_ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        self.labels = [-100] * prompt + self.input_ids[prompt:]


class LazySamples(Sequence):
    """n samples that are made when asked for, so that the samples themselves take no memory."""

    def __init__(self, n: int, low: int, high: int, vocabulary: int) -> None:
        self.n, self.low, self.high, self.vocabulary = n, low, high, vocabulary

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index >= self.n:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(self.low, self.high + 1, (), generator=generator))
        return Sample(length, length // 2, generator, self.vocabulary)


def make_samples(
    n: int, low: int, high: int, *, prompt_share: float = 0.5, vocabulary: int = VOCABULARY
) -> list[Sample]:
    """Lengths uniform in [low, high], the given share of each sample unsupervised."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (n,), generator=generator).tolist()
    return [Sample(k, min(int(k * prompt_share), k - 1), generator, vocabulary) for k in lengths]


def make_model(config: dict[str, int], *, vocabulary: int = VOCABULARY, device: str, dtype: torch.dtype) -> Any:
    """A Llama with rank 8 on all linears whose B is not zero, as after a warm-up. Attention: sdpa."""
    torch.manual_seed(0)
    return with_lora(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **config)).to(device, dtype), rank=8)


def with_lora(model: Any, rank: int) -> Any:
    """The model with an adapter on all linears whose B is not zero."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def make_batches(samples: list[Sample], max_tokens: int, device: str) -> list[dict[str, torch.Tensor]]:
    lengths = [len(sample.input_ids) for sample in samples]
    plan = plan_batches(lengths, max_tokens=max_tokens, max_samples=len(samples), seed=0)
    batches = [pad_batch([samples[i] for i in indices], 0) for indices in plan]
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def timed(run: Run, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds for all batches; gradients are dropped batch by batch."""
    on_gpu = batches[0]["input_ids"].is_cuda
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    model: Any, arms: dict[str, Callable], batches: list[dict[str, torch.Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, one unmeasured round first; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(-1, rounds):
        for name in names:
            with arms[name](model) as run:
                if turn < 0:
                    run(batches[0])
                value = timed(run, batches)
            if turn >= 0:
                seconds[name].append(value)
        names = names[1:] + names[:1]
    return seconds


def summary(seconds: dict[str, list[float]], n: int, base: str) -> dict[str, dict[str, float]]:
    """Median seconds and samples/s, and the median over rounds of base's time over the arm's."""
    return {
        name: {
            "median_seconds": statistics.median(values),
            "samples_per_second": n / statistics.median(values),
            f"speed_over_{base.replace(' ', '_')}": statistics.median(
                b / v for b, v in zip(seconds[base], values, strict=True)
            ),
        }
        for name, values in seconds.items()
    }


def usable_arms(model: Any, batch: dict[str, torch.Tensor]) -> tuple[dict[str, Callable], dict[str, str]]:
    """The arms that run here, and why the others do not."""
    usable, missing = {}, {}
    for name, arm in ARMS.items():
        try:
            with arm(model) as run:
                run(batch)
            usable[name] = arm
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return usable, missing


def speed(options: argparse.Namespace) -> dict[str, Any]:
    size = QUICK_MODEL if options.quick else MODEL
    n, low, high = (12, 16, 64) if options.quick else (64, 32, 256)
    model = make_model(size, device=options.device, dtype=options.dtype)
    batches = make_batches(make_samples(n, low, high), options.max_tokens, options.device)
    arms, missing = usable_arms(model, batches[0])
    seconds = interleaved(model, arms, batches, QUICK_ROUNDS if options.quick else ROUNDS)
    result = summary(seconds, n, "floor")
    with loop(model) as run:
        exact = [matrix(run(batch)) for batch in batches]
    for name, arm in arms.items():
        with arm(model) as run:
            parts = [run(batch) for batch in batches]
        if parts[0]:
            error = max(
                ((matrix(own) - right).norm(dim=1) / right.norm(dim=1)).max().item()
                for own, right in zip(parts, exact, strict=True)
            )
            result[name]["largest_relative_error"] = error
        if not options.quick or name in ("engine", "floor"):  # a process each
            result[name]["peak_memory_mb"] = peak_memory(name, options)
    dim, largest = exact[0].shape[1], max(len(batch["labels"]) for batch in batches)
    return {
        "model": {**size, "vocab_size": VOCABULARY, "rank": 8, "dim": dim, "attention": "sdpa"},
        "samples": {
            "n": n,
            "lengths": [low, high],
            "batches": len(batches),
            "max_tokens": options.max_tokens,
        },
        "largest_batch_of_gradients_mb": 4 * dim * largest / 2**20,
        "arms": result,
        "missing": missing,
        "seconds": seconds,
    }


def peak_memory(name: str, options: argparse.Namespace) -> float | None:
    """MB that an arm adds to the loaded model, measured in a fresh process."""
    return worker(options, "--peak-of", name)["peak_memory_mb"]


def worker(options: argparse.Namespace, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", options.device, "--max-tokens", str(options.max_tokens)]
    command += ["--threads", str(options.threads), *arguments, *(["--quick"] if options.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(options: argparse.Namespace) -> dict[str, Any]:
    """In a worker: the peak of one arm over the batches of the speed section, or of one stream."""
    if options.stream_of:
        size, low, high = QUICK_MODEL, 24, 32
        vocabulary = 512
    else:
        size, vocabulary = (QUICK_MODEL if options.quick else MODEL), VOCABULARY
        low, high = (16, 64) if options.quick else (32, 256)
    model = make_model(size, vocabulary=vocabulary, device=options.device, dtype=options.dtype)
    if options.stream_of:
        samples = LazySamples(options.stream_of, low, high, vocabulary)
        with PerSampleGradients(model) as per_sample:
            before = memory(options.device, reset=True)
            start = time.perf_counter()
            rows = sum(len(batch.indices) for batch in per_sample.stream(samples, max_tokens=2048))
            seconds = time.perf_counter() - start
        peak = memory(options.device)
        return {"rows": rows, "seconds": seconds, "peak_memory_mb": peak - before, "process_mb": peak}
    n = 12 if options.quick else 64
    batches = make_batches(make_samples(n, low, high), options.max_tokens, options.device)
    with ARMS[options.peak_of](model) as run:
        before = memory(options.device, reset=True)
        for batch in batches:
            run(batch)
        return {"peak_memory_mb": memory(options.device) - before}


def memory(device: str, *, reset: bool = False) -> float:
    """Peak MB so far of the resident set, or of the GPU's allocations; `reset` starts a new peak."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def prompts(options: argparse.Namespace) -> dict[str, Any]:
    """Our engine with its head on supervised positions, against the same engine with all logits."""
    n, length = (8, 64) if options.quick else (32, 256)
    result = {}
    for vocabulary in (VOCABULARY,) if options.quick else (VOCABULARY, 32768):
        size = QUICK_MODEL if options.quick else MODEL
        model = make_model(size, vocabulary=vocabulary, device=options.device, dtype=options.dtype)
        for share in (0.5, 0.75, 0.9):
            samples = make_samples(n, length // 2, length, prompt_share=share, vocabulary=vocabulary)
            batches = make_batches(samples, options.max_tokens, options.device)
            arms = {"supervised": engine, "all": all_logits_engine}
            seconds = interleaved(model, arms, batches, QUICK_ROUNDS if options.quick else 5)
            result[f"vocabulary {vocabulary}, {share:.0%} prompt"] = summary(seconds, n, "all")["supervised"]
    return result


def all_logits_engine(model: Any) -> Any:
    """The engine with the model's own logits at every position."""
    context = engine(model)

    class AllLogits:
        def __enter__(self) -> Run:
            run = context.__enter__()
            self.per_sample = run.__closure__[0].cell_contents  # type: ignore[attr-defined]
            self.per_sample._head.mode = "model"
            return run

        def __exit__(self, *exception: object) -> Any:
            return context.__exit__(*exception)

    return AllLogits()


def packing(options: argparse.Namespace) -> dict[str, Any]:
    """Padded against packed, batches of similar length and batches as they come."""
    size = QUICK_MODEL if options.quick else MODEL
    model = make_model(size, device=options.device, dtype=options.dtype)
    n = 24 if options.quick else 192
    samples = make_samples(n, 8, 96)
    chunk = max(1, options.max_tokens // 96)
    as_they_come = [
        {key: value.to(options.device) for key, value in pad_batch(samples[i : i + chunk], 0).items()}
        for i in range(0, n, chunk)
    ]
    arms = {"padded": lambda m: engine(m, packing=False), "packed": lambda m: engine(m, packing=True)}
    result = {}
    for kind, batches in (
        ("batches of similar length", make_batches(samples, options.max_tokens, options.device)),
        ("batches as they come", as_they_come),
    ):
        seconds = interleaved(model, arms, batches, QUICK_ROUNDS if options.quick else 5)
        cells = sum(batch["labels"].numel() for batch in batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        result[kind] = {"padding": 1 - tokens / cells, **summary(seconds, n, "padded")["packed"]}
    return result


def stream(options: argparse.Namespace) -> dict[str, Any]:
    few, many = (100, 1000) if options.quick else (1000, 10000)
    small, large = (worker(options, "--stream-of", str(n)) for n in (few, many))
    return {few: small, many: large, "ratio": large["process_mb"] / small["process_mb"]}


def precision(options: argparse.Namespace) -> dict[str, Any]:
    """bf16 base weights, adapter in fp32 (PEFT's default), against fp32 throughout."""
    size = QUICK_MODEL if options.quick else MODEL
    n, low, high = (8, 16, 64) if options.quick else (32, 32, 256)
    batches = make_batches(make_samples(n, low, high), options.max_tokens, options.device)
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(size, device=options.device, dtype=dtype)
        with engine(model) as run:
            rows[dtype] = torch.cat([matrix(run(batch)) for batch in batches])
    exact, rough = rows[torch.float32], rows[torch.bfloat16]
    error = (rough - exact).norm(dim=1) / exact.norm(dim=1)
    cosine = torch.cosine_similarity(rough, exact, dim=1)
    return {
        "median_relative_error": error.median().item(),
        "largest_relative_error": error.max().item(),
        "smallest_cosine": cosine.min().item(),
    }


def continued(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Sections measured earlier stay in the file where machine, versions and day are the same."""
    return earlier if earlier["machine"] == new["machine"] else new


SECTIONS = {"speed": speed, "prompts": prompts, "packing": packing, "stream": stream, "precision": precision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--quick", action="store_true", help="a smoke size, under a minute")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of: " + ", ".join(SECTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens of a batch, padding included")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights in the speed section")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--stream-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if options.bf16 else torch.float32
    torch.set_num_threads(options.threads)
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    if options.peak_of or options.stream_of:
        print(json.dumps(measure_peak(options)))
        return
    results = {"machine": describe("gradientspace", "transformers", "peft", "opacus", "bergson")}
    if options.json and options.json.exists():
        results = continued(json.loads(options.json.read_text()), results)
    for name in options.sections.split(","):
        results[name] = SECTIONS[name](options)
        shown = {key: value for key, value in results[name].items() if key != "seconds"}
        print(f"{name}\n{json.dumps(shown, indent=2)}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
