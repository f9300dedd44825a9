"""Write the README's result from the committed `results/demo.json`, so that no number is typed by hand.

gradientspace compare runs/demo/config.yaml --seeds 3 --json benchmarks/results/demo.json
python benchmarks/readme.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from results_table import RESULTS, read_table

from gradientspace.run_folder import write_text

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- result: written by benchmarks/readme.py -->", "<!-- end of result -->"
SHOWN = {"single": "one LoRA on the mix", "random": "random groups", "embedding": "embedding clusters",
         "gradientspace": "**GradientSpace, routed**", "oracle": "best expert a prompt (oracle)"}  # fmt: skip


def result_block(table: dict[str, Any]) -> str:
    """The README's table and verdict."""
    methods, gain = table["methods"], table["methods"]["gradientspace"]["difference"]["exact_match"]
    seeds = len(table["seeds"])
    n = methods["single"]["overall"]["n"]
    rows = [
        f"| {label} | {100 * methods[name]['overall']['exact_match']['mean']:.1f} % "
        f"| {methods[name]['overall']['loss']['mean']:.3f} |"
        for name, label in SHOWN.items()
    ]
    ours, embedding = table["clustering"], table["groupings"]["embedding"]
    return "\n".join(
        [
            START,
            f"On the demo's {n:.0f} test prompts (four skills crossed with four topics, equal training tokens, "
            f"{'one seed' if seeds == 1 else f'mean of {seeds} seeds'}):",
            "",
            "| | exact match | loss |",
            "|---|---|---|",
            *rows,
            "",
            f"Routed minus one LoRA: {100 * gain['mean']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to "
            f"{100 * gain['high']:+.1f} (paired bootstrap). Gradient clusters agree with the skills (adjusted Rand "
            f"{rand(ours, 'domain')}; with the topics {rand(ours, 'source')}), "
            f"embedding clusters with the topics ({rand(embedding, 'source')}; with the skills "
            f"{rand(embedding, 'domain')}).",
            END,
        ]
    )


def rand(grouping: dict[str, Any], label: str) -> str:
    return f"{grouping['agreement'][label]['ari']['mean']:.2f}"


def with_block(readme: str, block: str) -> str:
    """The README with its result replaced."""
    before, rest = readme.split(START, 1)
    return before + block + rest.split(END, 1)[1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    path = ROOT / "README.md"
    write_text(path, with_block(path.read_text(), result_block(read_table(RESULTS / "demo.json"))))


if __name__ == "__main__":
    main()
