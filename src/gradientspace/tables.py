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


def study_rows(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row a method of `study.table`: values, paired differences with intervals and signs, and what it costs."""
    methods = table["methods"]
    metrics = [m for m in ("loss", "exact_match") if any(m in row["overall"] for row in methods.values())]
    head = ["method"]
    for metric in metrics:
        head += [metric.replace("_", " "), f"minus {table['against']}", "95 % interval", "seeds"]
    head += ["clear", "tokens", "seconds", "peak MB", "passes"]
    rows = []
    for name, row in methods.items():
        difference, cells = row.get("difference", {}), [name]
        for metric in metrics:
            cells += [_number(row["overall"].get(metric)), *_difference_cells(difference.get(metric))]
        clear = {True: "yes", False: "no"}.get(difference.get("clear"), "")
        costs = [_number(row.get("seconds"), 1, ".0f"), _number(row.get("peak_memory_bytes"), 2**20, ".0f")]
        cells += [clear, _number(row["tokens"], 1, ",.0f"), *costs, _number(row["passes_per_token"], 1, "g")]
        rows.append(cells)
    return head, rows


def _number(value: dict[str, float] | None, unit: float = 1, form: str = ".4f") -> str:
    return "" if value is None else format(value["mean"] / unit, form)


def _difference_cells(difference: dict[str, Any] | None) -> list[str]:
    """Mean, interval and the sign of every seed."""
    if difference is None:
        return ["", "", ""]
    signs = "".join("+" if v > 0 else "-" if v < 0 else "0" for v in difference["by_seed"])
    interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    return [f"{difference['mean']:+.4f}", interval, signs]


def render(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: first column to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (str(cell) for cell in cells)
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *right]).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])
