"""Where the demo's gain comes from: exact match on test prompts in familiar wordings and in wordings new to training.

    python benchmarks/demo_wordings.py runs/demo-seed0 runs/demo-seed1 runs/demo-seed2 --json OUT.json

The runs are those of the demo's table (see `readme_page.py`). A prompt's wording is the longest phrase of its skill
that it holds.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from machine import describe

from gradientspace.demo.skills import REQUESTS, phrases
from gradientspace.files import write_json

METHODS = ("single", "single-long", "gradientspace")


def wording(prompt: str, skill: str) -> str:
    """The longest phrase that the prompt uses. Raises `ValueError` where it uses none."""
    found = [phrase for phrase in REQUESTS[skill] if re.search(_pattern(phrase), prompt, re.IGNORECASE)]
    if not found:
        raise ValueError(f"no phrase of {skill} in {prompt!r}")
    return max(found, key=len)


def _pattern(phrase: str) -> str:
    """The phrase with any words in the place of its item, person and place."""
    return re.sub(r"\\\{\w+\\\}", "[a-z ]+?", re.escape(phrase))


def measure(folders: list[Path]) -> dict[str, Any]:
    """Exact match of every method, mean over prompts of all runs, and the number of different prompts."""
    rows = [row for folder in folders for row in pq.read_table(folder / "evaluation/samples.parquet").to_pylist()]
    new = np.array([wording(row["prompt"], row["domain"]) in phrases(row["domain"], "test") for row in rows])
    exact = {method: np.array([row[f"exact_match:{method}"] for row in rows]) for method in METHODS}
    parts = {"familiar": ~new, "new": new}
    return {
        "runs": [folder.name for folder in folders],
        "prompts": {name: len({row["id"] for row, here in zip(rows, part, strict=True) if here})
                    for name, part in parts.items()},
        "exact_match": {name: {method: float(values[part].mean()) for method, values in exact.items()}
                        for name, part in parts.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {**measure(options.runs), "machine": describe()}
    print(json.dumps(found, indent=1))
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
