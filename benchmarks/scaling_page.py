"""Write the tables of docs/scaling.md from cost_model.py and the committed results.

    python benchmarks/scaling_page.py

The model is calibrated on one measured point, the engine of `results/gradients.json`, and every other point checks it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cost_model import (
    SHAPES,
    Mix,
    Shape,
    activation_bytes,
    clustering_bytes,
    clustering_flops,
    clustering_plan,
    gradient_flops,
    gradient_memory,
    stage_flops,
    sync_bytes,
    table_bytes,
)

from gradientspace.clustering.memory import format_bytes
from gradientspace.errors import ConfigError
from gradientspace.gradients.head import CHUNK_BYTES, CUDA_CHUNK_BYTES

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/scaling.md"

PEAK, SHARE = 989.4e12, 0.30
"""Dense bfloat16 FLOP/s of an H100 SXM by its data sheet, and the share of it that is assumed."""
FLOAT32, BANDWIDTH = 67e12, 3.35e12
"""Its float32 FLOP/s, in which the clusterer counts, and bytes/s, from the same sheet."""
RANK, K, GPU_MEMORY = 16, 8, 80 * 10**9
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
TINY_BASE = Shape(192, 512, 6, 6, 6, 4096)
"""The base of the real mix."""


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def short(value: float) -> str:
    """Three digits with a unit: 8.03e9 -> '8.03 G'."""
    for unit in ("", "k", "M", "G", "T", "P", "E", "Z", "Y"):
        if value < 999.5:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} R"


def hours(value: float) -> str:
    """Of one GPU: minutes below an hour, days above a hundred."""
    if value < 1:
        return f"{60 * value:.2g} min"
    return f"{value:.3g} h" if value < 100 else f"{value / 24:,.0f} d"


# ------------------------------------------------------------------- against measured points


def checks() -> str:
    """Predicted against measured on the machine of the results; the first row is what the speed was taken from."""
    gradients = load("gradients")
    rows = [*time_points(gradients), cluster_point(), *run_points(gradients), memory_point(gradients)]
    lines = [
        [name, predicted, measured, "calibrated" if ratio is None else f"{ratio - 1:+.0%}"]
        for name, predicted, measured, ratio in rows
    ]
    errors = [abs(ratio - 1) for *_, ratio in rows if ratio is not None]
    worst = f"Largest error of the {len(errors)} points that were not calibrated: {max(errors):.0%}."
    return table(["point", "model", "measured", "model over measured"], lines) + "\n\n" + worst


def bench_shape(gradients: dict[str, Any], vocabulary: int) -> Shape:
    model = gradients["speed"]["model"]
    heads = model["num_attention_heads"]
    return Shape(
        model["hidden_size"],
        model["intermediate_size"],
        model["num_hidden_layers"],
        heads,
        heads,
        vocabulary,
        tied=False,
    )


def uniform(low: int, high: int) -> tuple[float, float]:
    """Mean length, and mean length that a token's sample has."""
    lengths = range(low, high + 1)
    total = sum(lengths)
    return total / len(lengths), sum(n * n for n in lengths) / total


def flop_rate(gradients: dict[str, Any]) -> float:
    """FLOP/s of the engine in the calibrating point."""
    speed = gradients["speed"]
    mean, seen = uniform(*speed["samples"]["lengths"])
    shape = bench_shape(gradients, speed["model"]["vocab_size"])
    flops = gradient_flops(shape, speed["model"]["rank"], speed["samples"]["n"] * mean, seen, 0.5)
    return flops / speed["arms"]["engine"]["median_seconds"]


def time_points(gradients: dict[str, Any]) -> Any:
    rate = flop_rate(gradients)
    measured = gradients["speed"]["arms"]["engine"]["median_seconds"]
    yield f"gradients of 64 samples ({short(rate)}FLOP/s)", f"{measured:.2f} s", f"{measured:.2f} s", None
    mean, seen = uniform(128, 256)
    for name, values in gradients["prompts"].items():
        vocabulary, share = int(name.split()[1].rstrip(",")), float(name.split()[2].rstrip("%")) / 100
        flops = gradient_flops(bench_shape(gradients, vocabulary), 8, 32 * mean, seen, 1 - share)
        predicted, measured = flops / rate, values["median_seconds"]
        yield f"gradients, {name}", f"{predicted:.2f} s", f"{measured:.2f} s", predicted / measured


def cluster_point() -> tuple[str, str, str, float]:
    """Both sides of one stream, on one clock: their ratio does not depend on how busy the machine was."""
    cost = load("clustering")["cost"]["time beside the gradients"]
    gradients = load("gradients")
    mean, seen = uniform(32, 256)
    shape = bench_shape(gradients, gradients["speed"]["model"]["vocab_size"])
    flops = gradient_flops(shape, 8, mean, seen, 0.5)
    predicted = clustering_flops(cost["dim"], cost["n_clusters"]) / flops
    return (
        "clusterer's time over the gradients', FLOPs alone", f"{predicted:.1%}", f"{cost['share']:.1%}",
        predicted / cost["share"],
    )  # fmt: skip


def run_points(gradients: dict[str, Any]) -> Any:
    """Stages of the real mix: one epoch of training, and the whole clustering stage (its gradients counted)."""
    took, single = load("preflight-real-mix")["stages"], load("real-mix-seed0")
    fit = sum(single["clustering"]["sizes"])
    facts = single["methods"]["single"]
    tokens = facts["tokens"] / 2  # of two epochs
    length = tokens / fit
    one = gradient_flops(TINY_BASE, 8, 1.0, length, 0.5) / flop_rate(gradients)
    yield from (
        (f"real mix, {name}", f"{predicted:.0f} s", f"{measured:.0f} s", predicted / measured)
        for name, predicted, measured in (
            ("one epoch of training", one * tokens, took["shared"]["took"]),
            (
                "clustering stage",
                one * length * (fit + fit / 9 + facts["overall"]["n"] + 512),
                took["cluster"]["took"],
            ),
        )
    )


def memory_point(gradients: dict[str, Any]) -> tuple[str, str, str, float]:
    speed = gradients["speed"]
    shape = bench_shape(gradients, speed["model"]["vocab_size"])
    samples = round(speed["largest_batch_of_gradients_mb"] * 2**20 / (4 * speed["model"]["dim"]))
    predicted = gradient_memory(shape, 8, speed["samples"]["max_tokens"], samples, 4, CHUNK_BYTES)
    measured = speed["arms"]["engine"]["peak_memory_mb"] * 2**20
    return (
        "peak of the engine beyond the weights",
        format_bytes(predicted),
        format_bytes(measured),
        predicted / measured,
    )


# -------------------------------------------------------------------------------- the tables


def sizes() -> str:
    rows = []
    for name, shape in SHAPES.items():
        dim = shape.lora_dimension(RANK)
        one = gradient_flops(shape, RANK, 300.0, 300.0, 0.5)
        share = clustering_flops(dim, K) / one
        moved = clustering_bytes(dim, K, max(1, 2**30 // (4 * dim)))
        seconds = max(moved / BANDWIDTH, clustering_flops(dim, K) / FLOAT32) / (one / (SHARE * PEAK))
        rows.append(
            [
                name,
                short(shape.parameters),
                short(dim),
                short(one),
                f"{share:.2%}",
                format_bytes(moved),
                f"{seconds:.0%}",
            ]
        )
    header = ["base", "parameters", "D at rank 16", "FLOPs a sample", "clusterer's FLOPs over them",
              "bytes the clusterer moves", "its time over the gradient's"]  # fmt: skip
    return table(header, rows)


def run_hours() -> str:
    rows = []
    for name, shape in SHAPES.items():
        cells = []
        for n in SIZES:
            flops = stage_flops(shape, RANK, Mix(n), K)
            cells.append(hours(sum(flops.values()) / (SHARE * PEAK) / 3600))
        rows.append([name, *cells])
    return table(["base", *(f"{n:,}" for n in SIZES)], rows)


def stages() -> str:
    names = list(stage_flops(SHAPES["8B"], RANK, Mix(1), K))
    rows = []
    for name in ("0.1B", "8B", "70B"):
        flops = stage_flops(SHAPES[name], RANK, Mix(1), K)
        total = sum(flops.values())
        rows.append([name, *(f"{flops[stage] / total:.1%}" for stage in names)])
    return table(["base", *names], rows)


def memory() -> str:
    rows = []
    for name, shape in SHAPES.items():
        dim, weights = shape.lora_dimension(RANK), 2 * shape.parameters
        plan = clustering_plan(shape, RANK, K)
        batch = max(1, min(256, 2**30 // (4 * dim)))
        engine = gradient_memory(shape, RANK, 4096, batch, 2, CUDA_CHUNK_BYTES)
        rows.append([
            name, format_bytes(weights), format_bytes(activation_bytes(shape, RANK, 2)), format_bytes(engine),
            format_bytes(sum(plan.initialise.values())), format_bytes(sum(plan.stream.values())),
            fits(shape, weights + engine),
        ])  # fmt: skip
    header = ["base", "weights", "activations a token", "engine, 4,096 tokens", "clusterer, validation",
              "clusterer, stream", "in 80 GB"]  # fmt: skip
    return table(header, rows)


def fits(shape: Shape, taken: float) -> str:
    """What the plan becomes when weights and engine leave the clusterer only the rest of the GPU."""
    budget = GPU_MEMORY - int(taken)
    if budget <= 0:
        return "the base does not fit"
    try:
        plan = clustering_plan(shape, RANK, K, budget)
    except ConfigError:
        return "not with q = 64"
    passes = "1 pass" if plan.passes == 1 else f"{plan.passes} passes"
    return f"{passes} over M, caches {plan.cache_size} x {plan.cache_dtype}"


def records() -> str:
    rows = [
        [f"{n:,}", format_bytes(table_bytes(n, routable=False)), format_bytes(table_bytes(n)),
         format_bytes(2 * 8 * 300 * n), short(4 * SHAPES["8B"].lora_dimension(RANK) * n) + "B"]
        for n in SIZES
    ]  # fmt: skip
    header = [
        "samples",
        "table, plain",
        "table, routable",
        "tokens and labels, 300 each",
        "all gradients at 8B, for scale",
    ]
    return table(header, rows)


def network() -> str:
    rows = []
    for name, shape in SHAPES.items():
        dim = shape.lora_dimension(RANK)
        seconds = gradient_flops(shape, RANK, 300.0, 300.0, 0.5) / (SHARE * PEAK)
        rows_rate = sync_bytes(dim, K, 4096) / seconds
        sums_rate = sync_bytes(dim, K, 4096, "mean") / seconds
        rows.append([name, format_bytes(4 * dim), f"{1e3 * seconds:.1f} ms", format_bytes(rows_rate) + "/s",
                     format_bytes(sums_rate) + "/s"])  # fmt: skip
    header = ["base", "one row", "gradient of one sample", "`svd`: rows", "`mean`, `running`: sums, S = 4,096"]
    return table(header, rows)


def fsdp() -> str:
    rows = []
    for name in ("32B", "70B"):
        shape = SHAPES[name]
        moved = 2 * 2 * shape.parameters
        seconds = gradient_flops(shape, RANK, 4096.0, 300.0, 0.5) / (SHARE * PEAK)
        rows.append(
            [name, format_bytes(moved), *(f"{moved / rate:.1f} s" for rate in (450e9, 50e9)), f"{seconds:.1f} s"]
        )
    header = ["base", "gathered a batch", "at 450 GB/s (NVLink)", "at 50 GB/s (400 Gbit/s)", "products of 4,096 tokens"]
    return table(header, rows)


def simulation() -> str:
    if not (RESULTS / "simulated-stream.json").is_file():
        return "Not measured yet."
    found = load("simulated-stream")
    blocks = []
    for name, stream in found["streams"].items():
        marks = {key: value for key, value in stream["marks"].items() if key != "before"}
        rows = [
            [f"{int(n):,}", f"{m['ari_online']:.4f}", f"{m['ari_held_out']:.4f} ± {m['ari_held_out_deviation']:.4f}",
             f"{m['centroid_cosine']:.3f}", f"{m['peak_mb']:.1f}"]
            for n, m in marks.items()
        ]  # fmt: skip
        values = list(marks.values())
        growth = max(m["peak_mb"] for m in values) / values[0]["peak_mb"] - 1
        change = values[-1]["ari_held_out"] - values[0]["ari_held_out"]
        header = ["rows", "online since the mark before", "rows apart", "centroids' cosine", "peak MiB"]
        start = stream["marks"]["before"]["ari_held_out"]
        blocks.append(
            f"**{name[0].upper()}{name[1:]}** inside a cluster; before the stream {start:.4f} on rows apart.\n\n"
            f"{table(header, rows)}\n\nPeak memory after the first mark: {growth:+.1%}. Agreement on rows apart, last "
            f"mark against the first: {change:+.4f}."
        )
    return "\n\n".join(blocks)


def missing() -> str:
    """What only `gpu.py` on a GPU can say."""
    path = RESULTS / "gpu.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    wanted = {
        "gradients": "samples/s and share of the peak at 0.5B, 3B and 8B, ranks 8 and 16; engine against the\n  floor "
        "(wanted: at least 1.0 times) and against batch size one on short samples at 0.5B (at least 5 times)",
        "pass": "what clustering adds to the gradients' time",
        "memory": "D = 40 million with K = 8 against the printed plan (wanted: within 10 %)",
        "routed": "a batch of eight experts against one adapter",
        "settings": "the size of a chunk of logits, and tokens of a batch",
    }
    lines = [f"- `{name}`: {what}" for name, what in wanted.items() if name not in found]
    return "\n".join(lines) or "None."


BLOCKS = {
    "checks": checks, "sizes": sizes, "hours": run_hours, "stages": stages, "memory": memory, "records": records,
    "network": network, "fsdp": fsdp, "simulation": simulation, "missing": missing,
}  # fmt: skip


def with_tables(page: str) -> str:
    """The page with every `<!-- table NAME -->` ... `<!-- end of NAME -->` filled in."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- table {name}: written by benchmarks/scaling_page.py -->", f"<!-- end of {name} -->"
        before, rest = page.split(start, 1)
        page = before + start + "\n\n" + make() + "\n\n" + end + rest.split(end, 1)[1]
    return page


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
