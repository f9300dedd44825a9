"""Results as rows of text, for the terminal and the report alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def method_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row a method: overall and by-domain loss, and exact match where it was measured."""
    domains = results["domains"]
    generated = "exact_match" in results["methods"]["base"]["overall"]
    head = ["method", "loss", *([] if len(domains) < 2 else domains)]
    if generated:
        head += ["exact match", *([] if len(domains) < 2 else domains)]
    rows = []
    for name, method in results["methods"].items():
        shown = [method["overall"], *([] if len(domains) < 2 else (method["by_domain"][d] for d in domains))]
        row = [name, *(f"{v['loss']:.4f}" for v in shown)]
        if generated:
            row += [f"{100 * v['exact_match']:.1f} %" for v in shown]
        rows.append(row)
    return head, rows


def comparison_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row a method of `comparison.compare`: value and paired difference with its 95 % interval."""
    metrics = [m for m in ("loss", "exact_match") if any(m in row for row in comparison["methods"].values())]
    head = ["method"]
    for metric in metrics:
        head += [metric.replace("_", " "), f"minus {comparison['against']}", "95 % interval"]
    rows = []
    for name, row in comparison["methods"].items():
        cells = [name]
        for metric in metrics:
            difference = row.get(f"{metric}_difference")
            if difference is None:
                cells += ["", "", ""]
                continue
            interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
            cells += [f"{row[metric]:.4f}", f"{difference['mean']:+.4f}", interval]
        rows.append(cells)
    return head, rows


def render(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: first column to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (str(cell) for cell in cells)
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *right]).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])
