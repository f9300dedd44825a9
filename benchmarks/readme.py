"""Write the README's result from the committed `results/demo.json`, so that no number is typed by hand.

gradientspace demo && python benchmarks/readme.py runs/demo      take over a finished demo
python benchmarks/readme.py                                      write the README again from what is committed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gradientspace.run_folder import Run, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/demo.json"
START, END = "<!-- result: written by benchmarks/readme.py -->", "<!-- end of result -->"
SHOWN = {"single": "one LoRA on the mix", "random": "random groups", "embedding": "embedding clusters",
         "gradientspace": "**GradientSpace, routed**", "oracle": "best expert a prompt (oracle)"}  # fmt: skip


def result_block(results: dict[str, Any]) -> str:
    """The README's table and verdict."""
    methods, gain = results["methods"], results["comparisons"]["gradientspace - single"]["exact_match"]
    ours, embedding = results["clustering"]["agreement"], results["groupings"]["embedding"]["agreement"]
    rows = [
        f"| {label} | {100 * methods[name]['overall']['exact_match']:.1f} % | {methods[name]['overall']['loss']:.3f} |"
        for name, label in SHOWN.items()
    ]
    return "\n".join(
        [
            START,
            f"On the demo's {methods['single']['overall']['n']} test prompts (four skills crossed with four topics, "
            "equal training tokens, one seed):",
            "",
            "| | exact match | loss |",
            "|---|---|---|",
            *rows,
            "",
            f"Routed minus one LoRA: {100 * gain['mean']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to "
            f"{100 * gain['high']:+.1f} (paired bootstrap). Gradient clusters agree with the skills (adjusted Rand "
            f"{ours['domain']['ari']:.2f}; with the topics {ours['source']['ari']:.2f}), "
            f"embedding clusters with the topics ({embedding['source']['ari']:.2f}; with the skills "
            f"{embedding['domain']['ari']:.2f}).",
            END,
        ]
    )


def with_block(readme: str, block: str) -> str:
    """The README with its result replaced."""
    before, rest = readme.split(START, 1)
    return before + block + rest.split(END, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", nargs="?", help="a finished demo run to take over")
    run = parser.parse_args().run
    if run:
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, json.loads((Run.open(run).require("evaluation", "demo") / "results.json").read_text()))
    path = ROOT / "README.md"
    write_text(path, with_block(path.read_text(), result_block(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
