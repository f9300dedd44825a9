"""Real shapes on a GPU, with random weights made on it: nothing is downloaded.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json --sections gradients,memory     a call of ten minutes
    python benchmarks/gpu.py --json benchmarks/results/gpu.json                                 what is missing
    python benchmarks/gpu.py --smoke                        every section, tiny, on the CPU: no figures, only a check

Every cell is written as soon as it is measured and is not measured again; after `--minutes` no new one is begun, so
that two calls with the same file do all of it.

gradients  the engine, padded and packed, against a plain step (the floor) and batch size one, on short samples: samples
           and tokens a second, share of the GPU's peak, largest allocation, error against batch size one
pass       gradients streaming into the clusterer, as a run does it: the clusterer's share of the time
memory     the clusterer's printed memory plan against what it allocates, D = 40 million, K = 8
routed     a batch whose rows name eight experts, against one expert, one PEFT adapter and the base
settings   what was chosen without a GPU: the size of a chunk of logits, and tokens of a batch

The peak is that of dense bfloat16 products in NVIDIA's data sheets, by the device's name, or `--peak-tflops`; what a
large product of torch really reaches stands beside it. FLOPs are counted by cost_model.py, padding left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cost_model import SHAPES, Shape, gradient_flops
from gradient_rivals import engine, floor, loop, matrix
from gradients import interleaved, make_batches, make_samples, memory, summary, with_lora
from machine import describe
from serving import PeftModelAsExperts, measure, run_requests

from gradientspace.clustering import OnlineSVDClusterer, RowSource
from gradientspace.gradients import PerSampleGradients, head
from gradientspace.models import save_adapter
from gradientspace.stacked import BASE, StackedExperts

# TFLOP/s of dense bfloat16 products with float32 sums, from NVIDIA's data sheets (those with sparsity are twice that).
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "A100": 312.0, "L40S": 362.0,
    "L4": 121.0, "A10G": 70.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
N_EXPERTS, K, Q, N_VALIDATION, LARGEST_DIM = 8, 8, 64, 512, 40_000_000
LENGTHS = (32, 256)


@dataclass(frozen=True)
class Size:
    """How large each section is: on a GPU, or for the smoke."""

    shapes: dict[str, Shape]
    ranks: tuple[int, ...]
    tokens: dict[str, int]
    """Of a batch, by shape: activations of 5 to 8 MB a token and of stock PEFT more must fit beside the weights."""
    samples: int
    rounds: int
    dim: int
    n_validation: int
    batches: tuple[int, ...]
    new_tokens: int


GPU = Size(
    {name: SHAPES[name] for name in ("0.5B", "3B", "8B")}, (8, 16), {"0.5B": 16384, "3B": 8192, "8B": 4096},
    128, 3, LARGEST_DIM, N_VALIDATION, (1, 8, 64), 32,
)  # fmt: skip
SMOKE = Size({"smoke": Shape(64, 128, 2, 4, 2, 512)}, (4,), {"smoke": 512}, 8, 1, 20_000, 96, (1, 3), 4)

# A named cell and what measures it.
Cells = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def base_model(shape: Shape, device: str) -> Any:
    """Random bfloat16 weights, made on the device. A Llama whatever the shape's origin."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {name: value for name, value in asdict(shape).items() if name not in ("tied", "head_dim")}
    config = LlamaConfig(**values, tie_word_embeddings=shape.tied, max_position_embeddings=4096)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # an 8B model in float32 first would need twice the memory
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str) -> float:
    """What `work` takes, all that it queued on the device included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def each_adapter(size: Size, options: argparse.Namespace) -> Iterator[tuple[str, Shape, Callable[[], Any]]]:
    """Name, shape and a way to make the model, for every shape and rank."""
    for name, shape in size.shapes.items():
        for rank in size.ranks:
            yield (
                f"{name}, rank {rank}", shape,
                lambda shape=shape, rank=rank: with_lora(base_model(shape, options.device), rank),
            )  # fmt: skip


# ------------------------------------------------------------------------------- gradients

ARMS: dict[str, Callable[[Any], Any]] = {
    "engine": engine,
    "engine, packed": lambda model: engine(model, packing=True),
    "floor": floor,
    "loop of batch size one": loop,
}


def gradients(size: Size, options: argparse.Namespace) -> Cells:
    for name, shape, make in each_adapter(size, options):

        def run(name=name, shape=shape, make=make) -> dict[str, Any]:
            model, tokens = make(), size.tokens[name.split(",")[0]]
            samples = make_samples(size.samples, *LENGTHS, vocabulary=shape.vocab_size)
            batches = make_batches(samples, tokens, options.device)
            usable, missing = fitting(model, batches)
            times = interleaved(model, usable, batches, size.rounds)
            arms = summary(times, len(samples), "floor" if "floor" in usable else "engine")
            rank = int(name.rsplit(" ", 1)[1])
            for arm, values in arms.items():
                values |= speed(shape, rank, batches, values["median_seconds"], options)
                values["peak_memory_bytes"] = missing.pop(f"{arm}: bytes")
            found = {"dim": shape.lora_dimension(rank), "max_tokens": tokens, "batches": len(batches), "arms": arms}
            if "loop of batch size one" in arms:
                one = arms["loop of batch size one"]["median_seconds"]
                found["engine_over_batch_size_one"] = one / arms["engine"]["median_seconds"]
                found |= error(model, batches[0])
            return found | {"missing": missing}

        yield name, run


def fitting(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, Callable], dict[str, Any]]:
    """The arms whose largest batch fits, with their largest allocation; for the others, why not."""
    largest = max(batches, key=lambda batch: batch["labels"].numel())
    usable, notes = {}, {}
    device = "cuda" if largest["labels"].is_cuda else "cpu"
    for name, arm in ARMS.items():
        try:
            before = allocated(device, reset=True)
            with arm(model) as run:
                run(largest)
            usable[name], notes[f"{name}: bytes"] = arm, allocated(device) - before
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
            torch.cuda.empty_cache()
    return usable, notes


def allocated(device: str, *, reset: bool = False) -> int:
    """Bytes at the peak so far; with `reset`, bytes now, and a new peak begins."""
    if device == "cuda" and reset:
        memory(device, reset=True)
        return torch.cuda.memory_allocated()
    return round(memory(device, reset=reset) * 2**20)


def speed(
    shape: Shape, rank: int, batches: list[dict[str, torch.Tensor]], took: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second, padding left out, and the share of the peak."""
    lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches]).double()
    tokens = float(lengths.sum())
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) / tokens
    flops = gradient_flops(shape, rank, tokens, float(lengths.square().sum()) / tokens, supervised)
    rate = flops / took
    share = rate / (1e12 * options.peak_tflops) if options.peak_tflops else None
    return {"tokens_per_second": tokens / took, "flops_per_second": rate, "share_of_peak": share}


def error(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """The engine's rows of one batch against those of batch size one, both with bfloat16 weights."""
    few = {key: value[:8] for key, value in batch.items()}
    with engine(model) as run:
        ours = matrix(run(few))
    with loop(model) as run:
        exact = matrix(run(few))
    relative = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    cosine = torch.cosine_similarity(ours, exact, dim=1)
    return {"median_relative_error": float(relative.median()), "smallest_cosine": float(cosine.min())}


# ------------------------------------------------------------------------------------ pass


def one_pass(size: Size, options: argparse.Namespace) -> Cells:
    """Samples from the CPU, gradients, clusterer: once as a run does it, and once with each side on its own clock."""
    for name, shape, make in each_adapter(size, options):

        def run(name=name, shape=shape, make=make) -> dict[str, Any]:
            tokens = size.tokens[name.split(",")[0]]
            samples = make_samples(size.samples, *LENGTHS, vocabulary=shape.vocab_size)
            with PerSampleGradients(make(), self_check=False) as per_sample:
                clusterer = OnlineSVDClusterer(K, 0, n_components=Q)
                clusterer.initialize(torch.randn(2 * Q, per_sample.dim, device=options.device))
                for batch in per_sample.stream(samples[: size.samples // 4], max_tokens=tokens):
                    clusterer.partial_fit(batch.gradients)

                def whole() -> None:
                    for batch in per_sample.stream(samples, max_tokens=tokens, seed=1):
                        clusterer.partial_fit(batch.gradients)

                took, ours = seconds(whole, options.device), 0.0
                for batch in per_sample.stream(samples, max_tokens=tokens, seed=2):
                    ours += seconds(lambda batch=batch: clusterer.partial_fit(batch.gradients), options.device)
                apart = seconds(lambda: sum(1 for _ in per_sample.stream(samples, max_tokens=tokens)), options.device)
            return {
                "dim": per_sample.dim, "samples_per_second": len(samples) / took,
                "gradient_ms": 1e3 * apart / len(samples), "clustering_ms": 1e3 * ours / len(samples),
                "clustering_over_gradients": ours / apart, "together_over_sum": took / (ours + apart),
            }  # fmt: skip

        yield name, run


# ---------------------------------------------------------------------------------- memory


def memory_plan(size: Size, options: argparse.Namespace) -> Cells:
    yield f"D {size.dim:,}, K {K}", lambda: planned(size, options)


def planned(size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Plan and allocations of both phases, on random rows; the plan is cut to what is free, as in a run."""
    device, dim = options.device, size.dim
    rows = max(1, min(256, 2**30 // (4 * dim)))
    clusterer = OnlineSVDClusterer(K, 0, n_components=Q, n_validation=size.n_validation, batch_size=rows)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    plan = clusterer.plan_memory(dim, free, device)
    print(plan.table(), flush=True)
    clusterer.set_params(cache_size=plan.cache_size, cache_dtype=plan.cache_dtype)

    def made(seed: int, n: int) -> torch.Tensor:
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.randn(n, dim, device=device, generator=generator)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, size.n_validation, rows):
            index = torch.arange(start, min(start + rows, size.n_validation), device=device)
            yield index, made(start, len(index))

    before = allocated(device, reset=True)
    if plan.passes == 1:
        clusterer.initialize(made(0, size.n_validation))
    else:
        clusterer.initialize(RowSource(batches, (size.n_validation, dim), plan.columns, torch.device(device)))
    phases = {"initialise": allocated(device) - before}
    allocated(device, reset=True)
    for step in range(-(-2 * K * plan.cache_size // rows)):  # every cache is filled and emptied
        clusterer.partial_fit(made(step, rows))
    phases["stream"] = allocated(device) - before
    found = {"passes": plan.passes, "cache": f"{plan.cache_size} x {plan.cache_dtype}", "free_bytes": free}
    for phase, measured in phases.items():
        expected = sum(getattr(plan, phase).values())
        found[phase] = {"planned_bytes": expected, "measured_bytes": measured, "ratio": measured / expected}
    return found


# ---------------------------------------------------------------------------------- routed


def routed(size: Size, options: argparse.Namespace) -> Cells:
    for name, shape in size.shapes.items():
        if name != "3B":  # the smallest and the largest say enough
            yield name, lambda shape=shape: serve(shape, size, options)


def serve(shape: Shape, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second at several batch sizes: prompts of 32 tokens, greedy, a fixed number of new ones."""
    rank = size.ranks[-1]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, shape.vocab_size, (max(size.batches), 32), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        folders = random_adapters(shape, rank, Path(folder), options.device)
        stacked = StackedExperts(base_model(shape, options.device), folders)
        peft = PeftModelAsExperts(base_model(shape, options.device), {"expert_0": folders["expert_0"]}, mixes=False)

    def arm(experts: Any, expert_of: Callable[[int], int]) -> Callable[[int], None]:
        def run(b: int) -> None:
            run_requests(experts, [expert_of(i) for i in range(b)], size.new_tokens, prompts[:b])
            synchronise(options.device)

        return run

    arms = {
        "base": arm(stacked, lambda i: BASE),
        "one LoRA": arm(peft, lambda i: 0),
        "one expert": arm(stacked, lambda i: 0),
        "mixed": arm(stacked, lambda i: i % N_EXPERTS),
    }
    found: dict[str, Any] = {"rank": rank, "experts": N_EXPERTS, "new_tokens": size.new_tokens, "batches": {}}
    for b in size.batches:
        took = measure(arms, b, size.rounds)
        rates = {name: b * size.new_tokens / value for name, value in took.items()}
        found["batches"][str(b)] = {"tokens_per_second": rates, "mixed_over_one_lora": took["one LoRA"] / took["mixed"]}
    return found


def random_adapters(shape: Shape, rank: int, folder: Path, device: str) -> dict[str, Path]:
    model = with_lora(base_model(shape, device), rank)
    folders = {f"expert_{k}": folder / str(k) for k in range(N_EXPERTS)}
    for path in folders.values():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        save_adapter(model, path)
    return folders


# -------------------------------------------------------------------------------- settings


def settings(size: Size, options: argparse.Namespace) -> Cells:
    name, shape = next(iter(size.shapes.items()))
    rank = size.ranks[0]

    def took(tokens: int) -> float:
        samples = make_samples(size.samples, *LENGTHS, vocabulary=shape.vocab_size)
        batches = make_batches(samples, tokens, options.device)
        model = with_lora(base_model(shape, options.device), rank)
        return statistics.median(interleaved(model, {"engine": engine}, batches, size.rounds)["engine"])

    def chunks() -> dict[str, Any]:
        constant = "CUDA_CHUNK_BYTES" if options.device == "cuda" else "CHUNK_BYTES"
        before, found = getattr(head, constant), {}
        try:
            for mib in (32, 128, 256, 1024):
                setattr(head, constant, mib * 2**20)
                found[f"{mib} MiB"] = took(size.tokens[name])
        finally:
            setattr(head, constant, before)
        return {"seconds": found}

    def tokens() -> dict[str, Any]:
        return {"seconds": {str(n): took(n) for n in (2048, 4096, 8192, 16384) if n <= 32 * size.tokens[name]}}

    yield f"{name}: bytes of a chunk of logits", chunks
    yield f"{name}: tokens of a batch", tokens


# ------------------------------------------------------------------------------------ main

SECTIONS: dict[str, Callable[[Size, argparse.Namespace], Cells]] = {
    "gradients": gradients,
    "pass": one_pass,
    "memory": memory_plan,
    "routed": routed,
    "settings": settings,
}


def peak_of(device_name: str) -> float | None:
    """TFLOP/s by the first entry of the table whose words the name has."""
    words = set(device_name.replace("-", " ").split())
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= words), None)


def matmul_tflops(device: str) -> float:
    """What torch reaches in bfloat16 products of 8192 x 8192 (512 on the CPU), random numbers, best of five."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5)) / 1e12


def earlier(path: Path | None, machine: dict[str, Any]) -> dict[str, Any]:
    """What the file has. Ends the program where it is of another machine or other versions."""
    if path is None or not path.is_file():
        return {}
    results = json.loads(path.read_text())
    if any(results["machine"][key] != machine[key] for key in ("processor", "gpu", "versions")):
        refuse(f"{path} is of another machine or other versions ({results['machine']['gpu']}): give another file")
    return results


def refuse(reason: str) -> None:
    print(f"gpu.py: {reason}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there, and measure only what is missing")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of: " + ", ".join(SECTIONS))
    parser.add_argument("--smoke", "--quick", action="store_true", help="every section in a tiny size, on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="no cell is begun later than this")
    parser.add_argument("--peak-tflops", type=float, help="of dense bfloat16 products, where the name is not known")
    options = parser.parse_args()
    if unknown := set(options.sections.split(",")) - set(SECTIONS):
        refuse(f"no section {unknown.pop()!r}: there are {', '.join(SECTIONS)}")
    if not options.smoke and not torch.cuda.is_available():
        refuse("no CUDA device, and these are figures of a GPU; --smoke runs every section, tiny, on the CPU")
    begun, size = time.monotonic(), SMOKE if options.smoke else GPU
    options.device = "cpu" if options.smoke else "cuda"
    warnings.simplefilter("ignore")
    machine = describe("gradientspace", "transformers", "peft")
    results = earlier(options.json, machine) | {"machine": machine, "smoke": options.smoke}
    if not options.smoke:
        options.peak_tflops = options.peak_tflops or peak_of(machine["gpu"])
        results |= {"peak_tflops": options.peak_tflops, "matmul_tflops": matmul_tflops(options.device)}
    for section in options.sections.split(","):
        done = results.setdefault(section, {})
        for name, run in SECTIONS[section](size, options):
            if name in done:
                continue
            if time.monotonic() - begun > 60 * options.minutes:
                print(f"{section}: {name}: not begun after {options.minutes:g} minutes; call again", flush=True)
                continue
            done[name] = attempt(run)
            print(f"{section}: {name}: {json.dumps(done[name])}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell's numbers and seconds; a cell too large for the device says so, and the others go on."""
    start = time.monotonic()
    try:
        found = run()
    except torch.OutOfMemoryError as failure:
        found = {"missing": f"out of memory: {str(failure).splitlines()[0]}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found | {"cell_seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    main()
