"""The measured parts of docs/training.md, from `results/preflight-*.json`, `training.json` and `long-process.json`."""

from __future__ import annotations

from wording import measured_on, paragraph, read, table

RUNS = {"preflight-demo": "the demo", "preflight-real-mix": "the real mix"}


def dry_run() -> str:
    """Estimate over what the run then took, in all and of the stage that was furthest off."""
    parts = []
    for name, run in RUNS.items():
        stages = dict(read(name)["stages"])
        whole = ratio(stages.pop("all"))
        furthest = max(stages, key=lambda stage: max(ratio(stages[stage]), 1 / ratio(stages[stage])))
        parts.append(f"{run}: {whole:.2f} times in all, furthest off {furthest} ({ratio(stages[furthest]):.2f} times)")
    return paragraph(
        "On an idle machine the estimate was, of what the run then took (`benchmarks/results/preflight-*.json`): "
        f"{'; '.join(parts)}. Short stages can be far off, such as a router whose prompts are encoded by then."
    )


def step() -> str:
    """Speed of a step with the head on supervised positions over one with all logits."""
    found = read("training")
    rows = [
        [
            f"{cell['vocabulary']:,}",
            f"{cell['prompt_share']:.0%}",
            f"{arms['supervised rows']['speed_over_all_logits']:.2f}",
        ]
        for cell in found["cells"]
        for arms in [cell["arms"]]
    ]
    size = found["model"]
    around = (
        f"Forward and backward of a Llama of {size['num_hidden_layers']} layers and width {size['hidden_size']} "
        f"(`benchmarks/training.py`, arms interleaved in one run). {measured_on(found['machine'])}"
    )
    return "\n\n".join([table(["vocabulary", "prompt", "times as fast"], rows), paragraph(around)])


def parts() -> str:
    """Speed of a step in parts of a batch over one of the whole batch."""
    found = read("training")["parts"]
    faster = [
        f"{arm['speed_over_whole_batch']:.2f} times as fast with parts of {name}"
        for name, arm in found["arms"].items()
        if name != "whole batch"
    ]
    low, high = found["lengths"]
    return paragraph(
        f"Batches of {found['rows']} rows of {low} to {high} tokens, {found['padding']:.0%} of them padding (the same "
        f"script and model, bf16): {', '.join(faster)}."
    )


def long_process() -> str:
    """The same batches at a process's start and after many others, with sizes as they come and with repeated ones."""
    found = read("long-process")
    rows = [
        [
            arm,
            f"{cell['early_seconds']:.1f}",
            f"{cell['late_seconds']:.1f}",
            f"{cell['late_over_early']:.2f}",
            f"{cell['early_resident_mb']:,.0f}",
            f"{cell['late_resident_mb']:,.0f}",
        ]
        for arm, cell in found["arms"].items()
    ]
    head = ["sizes", "early (s)", "late (s)", "late over early", "resident early (MB)", "resident late (MB)"]
    around = (
        f"Forward and backward of {found['window']} batches of 16 rows at the start of a process, and of the same ones "
        f"{found['between']} other batches later (`benchmarks/long_process.py`, each line in a process of its own). "
        f"{measured_on(found['machine'])}"
    )
    return "\n\n".join([table(head, rows), paragraph(around)])


def ratio(stage: dict[str, float]) -> float:
    return stage["estimate"] / stage["took"]
