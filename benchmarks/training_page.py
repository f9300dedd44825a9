"""The measured part of docs/training.md, from `results/preflight-*.json`."""

from __future__ import annotations

from wording import paragraph, read

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


def ratio(stage: dict[str, float]) -> float:
    return stage["estimate"] / stage["took"]
