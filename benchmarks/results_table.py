"""Committed results, of one run or of several seeds, in one shape: every number is {"mean", "low", "high"}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradientspace.study import spread

RESULTS = Path(__file__).resolve().parent / "results"


def read_table(path: Path) -> dict[str, Any]:
    """A file of `gradientspace compare --json`, or the `evaluation/results.json` of one run as a table of one seed."""
    results = json.loads(path.read_text())
    if "seeds" in results:
        return results
    comparisons = {name: _of_one_seed(pair) for name, pair in results["comparisons"].items()}
    methods = {
        name: {**_spread(method), "difference": comparisons.get(f"{name} - single", {})}
        for name, method in results["methods"].items()
    }
    return {
        **{name: results[name] for name in ("schema", "run", "split", "domains")},
        "seeds": [results["seed"]],
        "against": "single",
        "methods": methods,
        "comparisons": comparisons,
        "clustering": _spread(results["clustering"]),
        "groupings": _spread(results["groupings"]),
    }


def _of_one_seed(pair: dict[str, Any]) -> dict[str, Any]:
    intervals = {m: v if isinstance(v, dict) else spread([v]) for m, v in pair.items()}
    for metric in ("loss", "exact_match"):
        if metric in intervals:
            intervals[metric] = {**intervals[metric], "by_seed": [intervals[metric]["mean"]]}
    return intervals


def _spread(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k == "n" else _spread(v) for k, v in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return spread([value])
    return [value]


def is_table(path: Path) -> bool:
    """Does this results file hold methods, or something else a benchmark wrote?"""
    return "methods" in json.loads(path.read_text())
