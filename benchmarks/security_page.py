"""The measured part of docs/security.md, from `results/fuzz.json`."""

from __future__ import annotations

from wording import paragraph, read, table


def fuzz() -> str:
    """How many cases of every surface there were, and how they ended."""
    found = read("fuzz")
    surfaces = found["surfaces"]
    slowest = max(surface["slowest_seconds"] for surface in surfaces.values())
    head = paragraph(
        f"The committed search of {found['date']} (`benchmarks/results/fuzz.json`): {found['cases']:,} cases, none of "
        f"which failed; the slowest took {slowest:.1f} s."
    )
    rows = [
        [f"`{name}`", s["what"], *(f"{s[key]:,}" for key in ("cases", "results", "one_line_errors"))]
        for name, s in surfaces.items()
    ]
    return f"{head}\n\n{table(['surface', 'what is made up', 'cases', 'results', 'one line'], rows)}"
