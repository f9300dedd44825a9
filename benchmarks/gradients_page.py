"""The measured part of docs/gradients.md, from `results/gradients.json`.

python benchmarks/gradients.py --json benchmarks/results/gradients.json
"""

from __future__ import annotations

from typing import Any

from wording import read


def part() -> str:
    """Speed, head, packing, stream and precision, in this order."""
    results = read("gradients")
    parts = [machine(results["machine"]), speed(results["speed"]), head(results["prompts"])]
    parts += [packing(results["packing"]), stream(results["stream"]), precision(results["precision"])]
    return "\n\n".join(parts)


def machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    return f"Measured on {where}; {versions}; {machine['date']}."


def speed(speed: dict[str, Any]) -> str:
    model, samples, arms = speed["model"], speed["samples"], speed["arms"]
    rounds = len(speed["seconds"]["floor"])
    loop = arms["loop of batch size one"]["median_seconds"]
    rows = [
        f"| {name} | {arm['samples_per_second']:.1f} | {arm['speed_over_floor']:.2f} | "
        f"{loop / arm['median_seconds']:.2f} | {arm['peak_memory_mb']:.0f} | {error(arm)} |"
        for name, arm in sorted(arms.items(), key=lambda item: item[1]["median_seconds"])
    ]
    return "\n".join(
        [
            f"**Speed.** Llama of hidden size {model['hidden_size']}, {model['num_hidden_layers']} layers, rank "
            f"{model['rank']} on all linears (D = {model['dim']:,}), {samples['n']} samples of {samples['lengths'][0]} "
            f"to {samples['lengths'][1]} tokens, attention {model['attention']}, fp32, medians of {rounds} interleaved "
            "rounds. The floor is stock PEFT's batched forward and backward with our loss, head and batches, for the "
            f"adapter's weights only. One batch of gradients takes {speed['largest_batch_of_gradients_mb']:.0f} MB.",
            "",
            "| | samples/s | times the floor | times batch size one | peak MB | largest error |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def error(arm: dict[str, Any]) -> str:
    value = arm.get("largest_relative_error")
    return "not per sample" if value is None else f"{value:.0e}"


def head(prompts: dict[str, Any]) -> str:
    gains = "; ".join(f"{case}: {values['speed_over_all']:.2f}x" for case, values in prompts.items())
    return f"**Logits only where a token is supervised**, against logits everywhere: {gains}."


def packing(packing: dict[str, Any]) -> str:
    gains = "; ".join(
        f"{case} ({values['padding']:.0%} padding): {values['speed_over_padded']:.2f}x"
        for case, values in packing.items()
    )
    return f"**Packing** short samples (8 to 96 tokens) into one row, against padding: {gains}."


def stream(stream: dict[str, Any]) -> str:
    (few, small), (many, large) = [(n, values) for n, values in stream.items() if n != "ratio"]
    return (
        f"**Memory of a stream.** The process peaks at {small['process_mb']:.0f} MB over {int(few):,} samples and at "
        f"{large['process_mb']:.0f} MB over {int(many):,}: {stream['ratio']:.3f} times."
    )


def precision(precision: dict[str, Any]) -> str:
    return (
        "**bf16 weights** under an fp32 adapter, against fp32 throughout: median relative error of a gradient "
        f"{precision['median_relative_error']:.1%}, largest {precision['largest_relative_error']:.1%}, smallest cosine "
        f"{precision['smallest_cosine']:.4f}."
    )
