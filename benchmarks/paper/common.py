"""What the scripts of the paper's artefacts share: where results lie, and the machine they were measured on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gradientspace.files import write_json

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))

from machine import describe  # noqa: E402
from paper_page import BY_METHOD, minus_single  # noqa: E402
from results_table import is_table, read_table  # noqa: E402

__all__ = [
    "BENCHMARKS",
    "BY_METHOD",
    "RESULTS",
    "ROOT",
    "describe",
    "is_table",
    "minus_single",
    "read_table",
    "write_results",
]


def write_results(path: Path | None, results: dict[str, Any]) -> None:
    """Write a results file, where one was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
