"""The dry run's estimate against a run that really took place, on the same machine: stage by stage and in all.

    python benchmarks/preflight.py runs/demo/config.yaml runs/demo/stages.json --json OUT.json

`stages.json` is what a run leaves of its times. Stages that are estimated together are added up.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from machine import describe

from gradientspace import preflight
from gradientspace.config import load_config
from gradientspace.preflight import Estimate, estimate, format_seconds
from gradientspace.tables import render

_FOLDERS = {"cluster": "clustering", "experts": "experts/"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("stages", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a shorter probe")
    options = parser.parse_args()
    if options.quick:
        preflight.PROBE_SECONDS = 1.0
    start = time.perf_counter()
    estimates = estimate(load_config(options.config))
    probe = time.perf_counter() - start
    took = {name: cost["seconds"] for name, cost in json.loads(options.stages.read_text()).items()}
    pairs = {e.stage: (e.seconds, taken_by(e, took)) for e in estimates}
    pairs["all"] = (sum(e.seconds for e in estimates), sum(took.values()))
    print(render(
        ["stage", "estimate", "took", "ratio"],
        [[name, format_seconds(a), format_seconds(b), f"{a / b:.2f}" if b else ""] for name, (a, b) in pairs.items()],
    ))  # fmt: skip
    print(f"\nthe dry run itself took {format_seconds(probe)}")
    if options.json:
        result = {
            "stages": {name: {"estimate": round(a, 2), "took": round(b, 2)} for name, (a, b) in pairs.items()},
            "dry_run_seconds": round(probe, 1),
            "machine": describe("transformers", "peft", "gradientspace"),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def taken_by(estimate: Estimate, took: dict[str, float]) -> float:
    """Seconds of the stages that one estimate stands for."""
    name = estimate.stage.split(" (")[0]
    baseline = f"baselines/{name}/"
    prefix = _FOLDERS.get(name) or (baseline if any(stage.startswith(baseline) for stage in took) else name)
    return sum(s for stage, s in took.items() if stage == prefix or (prefix.endswith("/") and stage.startswith(prefix)))


if __name__ == "__main__":
    main()
