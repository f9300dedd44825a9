"""How the pages' generated parts are laid out: results read, paragraphs wrapped, tables, intervals."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = 120


def read(name: str) -> dict[str, Any]:
    """A committed results file by its stem."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *("---:" for _ in head[1:])], *rows])


def interval(value: dict[str, float], form: str = "{:+.4f}") -> str:
    """`mean (low to high)`."""
    return f"{form.format(value['mean'])} ({form.format(value['low'])} to {form.format(value['high'])})"


def measured_on(machine: dict[str, Any]) -> str:
    """Processor, threads, versions and date, as one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    return f"Measured on {where}; {versions}; {machine['date']}."
