"""The measured part of docs/security.md, from `results/fuzz.json`.

python benchmarks/security_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs/security.md", ROOT / "benchmarks/results/fuzz.json"
START = "<!-- measured fuzz: written by benchmarks/security_page.py -->"
END = "<!-- end of fuzz -->"


def fuzz(found: dict[str, Any]) -> str:
    """How many cases of every surface there were, and how they ended."""
    surfaces = found["surfaces"]
    slowest = max(surface["slowest_seconds"] for surface in surfaces.values())
    rows = [
        f"| `{name}` | {s['what']} | {s['cases']:,} | {s['results']:,} | {s['one_line_errors']:,} |"
        for name, s in surfaces.items()
    ]
    return "\n".join([
        f"The committed search of {found['date']} (`benchmarks/results/fuzz.json`): {found['cases']:,} cases, none of",
        f"which failed; the slowest took {slowest:.1f} s.",
        "",
        "| surface | what is made up | cases | results | one line |",
        "|---|---|---|---|---|",
        *rows,
    ])  # fmt: skip


def filled(text: str, found: dict[str, Any]) -> str:
    """The page with its measured part made anew."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{fuzz(found)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text())), encoding="utf-8")
