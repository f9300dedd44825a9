"""Write the numbers of docs/reliability.md from the committed `results/faults.json`, so that none is typed by hand.

python benchmarks/faults.py --json benchmarks/results/faults.json
python benchmarks/faults_page.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradientspace.files import read_json, write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reliability.md"
RESULTS = ROOT / "benchmarks/results/faults.json"
START, END = "<!-- numbers: written by benchmarks/faults_page.py -->", "<!-- end of numbers -->"
WHAT = {
    "random": "SIGKILL at a random instant",
    "writes": "SIGKILL at every recorded write",
    "terminate": "SIGTERM at a random instant",
    "interrupt": "Ctrl-C (SIGINT) at a random instant",
    "full": "no space left at a recorded write",
    "damaged": "a file of a finished stage flipped, cut or removed",
    "demo": "SIGKILL at a random instant, demo",
}


def read() -> dict[str, Any]:
    return read_json(RESULTS) if RESULTS.exists() else {"campaigns": {}}


def block(results: dict[str, Any]) -> str:
    """The table of campaigns, where the strikes fell, and what came out wrong."""
    campaigns = {name: results["campaigns"][name] for name in WHAT if name in results["campaigns"]}
    lines = [START]
    if campaigns:
        lines += [
            "| what was done | times | starts | folders compared | files compared | stages struck | came out wrong |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
    for name, found in campaigns.items():
        cells = [WHAT[name], *(f"{found[key]:,}" for key in ("strikes", "starts", "folders", "files_compared")),
                 str(len(found["by_stage"])), str(len(found["wrong"]))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    missing = [WHAT[name] for name in WHAT if name not in campaigns]
    lines += ["", *(_subject(name, campaigns) for name in ("micro", "demo") if _first(name, campaigns)), ""]
    if missing:
        lines += [f"Not measured yet: {'; '.join(missing)}.", ""]
    lines += [*(_where(WHAT[name], found) for name, found in campaigns.items() if name in ("random", "demo")), END]
    return "\n".join(lines)


def _first(subject: str, campaigns: dict[str, Any]) -> dict[str, Any] | None:
    return next((found for found in campaigns.values() if found["subject"] == subject), None)


def _subject(name: str, campaigns: dict[str, Any]) -> str:
    found = [c for c in campaigns.values() if c["subject"] == name]
    continued = sum(c["continued_within_a_stage"] for c in found)
    return (
        f"The {name} run: {found[0]['stages']} stages, {found[0]['uninterrupted_seconds']:g} s uninterrupted on the "
        f"machine at hand; {continued:,} starts went on within a stage, from a checkpoint."
    )


def _where(what: str, found: dict[str, Any]) -> str:
    return f"{what}, by what the run was at: {', '.join(f'{s} {n}' for s, n in found['by_stage'].items())}.\n"


def with_block(text: str, block: str) -> str:
    before, rest = text.split(START, 1)
    return before + block + rest.split(END, 1)[1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    write_text(PAGE, with_block(PAGE.read_text(), block(read())))


if __name__ == "__main__":
    main()
