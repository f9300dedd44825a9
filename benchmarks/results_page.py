"""The measured part of docs/results.md: every committed results file that holds a table of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results_table import RESULTS, is_table, read_table

TITLES = {
    "real-mix": "The real mix",
    "real-mix-headline": "The real mix, the headline pairs on more seeds",
    "real-mix-seed0": "The real mix, first table (one seed, before any choice was made on dev)",
    "demo": "The demo",
    "demo-epyc": "The demo again, on another kind of processor",
    "demo-one-skill": "The demo's control with one skill (nothing to split)",
    "demo-by-topic": "The demo's control by topic (embeddings suffice)",
}


def part(folder: Path = RESULTS) -> str:
    """A section for each table, those with a title first."""
    files = {path.stem: path for path in sorted(folder.glob("*.json")) if is_table(path)}
    names = [*(n for n in TITLES if n in files), *(n for n in files if n not in TITLES)]
    return "\n".join(section(name, read_table(files[name])) for name in names).rstrip()


def section(name: str, table: dict[str, Any]) -> str:
    """One results file: losses by domain, differences, costs, and what the clusters agree with."""
    seeds = ", ".join(str(seed) for seed in table["seeds"])
    n = max(m["overall"]["n"] for m in table["methods"].values())
    lines = [
        f"## {TITLES.get(name, name)}",
        "",
        f"`benchmarks/results/{name}.json`: {n} samples of `{table['split']}`, "
        f"seed{'s' if len(table['seeds']) > 1 else ''} {seeds}.",
        "",
        *losses(table),
        "",
        *differences(table),
        "",
        *costs(table),
        "",
    ]
    agreements = agreement(table)
    return "\n".join([*lines, *agreements, ""] if agreements else lines)


def losses(table: dict[str, Any]) -> list[str]:
    domains = table["domains"] if len(table["domains"]) > 1 else []
    generated = any("exact_match" in m["overall"] for m in table["methods"].values())
    rows = []
    for name, method in table["methods"].items():
        overall = method["overall"]
        cells = [
            interval(overall["loss"], "{:.4f}"),
            *(f"{method['by_domain'][d]['loss']['mean']:.4f}" for d in domains),
        ]
        if generated:
            cells.append(interval({k: 100 * v for k, v in overall["exact_match"].items()}, "{:.1f}") + " %")
        rows.append([name, *cells])
    return markdown(["method", "loss", *domains, *(["exact match"] if generated else [])], rows)


def differences(table: dict[str, Any]) -> list[str]:
    rows = []
    for pair, found in table["comparisons"].items():
        loss = found["loss"]
        signs = "".join("+" if v > 0 else "-" for v in loss["by_seed"])
        clear = {True: "yes", False: "no"}.get(found.get("clear"), "")
        rows.append([pair, interval(loss, "{:+.4f}"), f"`{signs}`", clear])
    return markdown(["difference in loss", "mean and interval", "seeds", "clear"], rows)


def costs(table: dict[str, Any]) -> list[str]:
    measured = any("seconds" in m for m in table["methods"].values())
    rows = []
    for name, method in table["methods"].items():
        cells = [f"{method[c]['mean']:,.0f}" for c in ("tokens", "parameters", "passes_per_token")]
        if measured:
            cells += [number(method.get("seconds"), 1), number(method.get("peak_memory_bytes"), 2**20)]
        rows.append([name, *cells])
    head = ["method", "training tokens", "adapter parameters", "forward passes a token"]
    return markdown([*head, *(["seconds", "peak MB"] if measured else [])], rows)


def agreement(table: dict[str, Any]) -> list[str]:
    """Adjusted Rand of every grouping with the labels; tables of several configs keep it in their files."""
    if isinstance(table["run"], list):
        return []
    groupings = {"gradientspace": table["clustering"], **table["groupings"]}
    labels = list(table["clustering"]["agreement"])
    rows = [
        [
            name,
            interval(grouping["n_clusters"], "{:g}"),
            *(interval(grouping["agreement"][x]["ari"], "{:.3f}") for x in labels),
        ]
        for name, grouping in groupings.items()
    ]
    return markdown(["groups", "K", *(f"adjusted Rand with {label}" for label in labels)], rows) if labels else []


def interval(value: dict[str, float], form: str) -> str:
    """`mean (low to high)`, or the mean alone where there is no spread."""
    mean = form.format(value["mean"])
    if value["low"] == value["high"]:
        return mean
    return f"{mean} ({form.format(value['low'])} to {form.format(value['high'])})"


def number(value: dict[str, float] | None, unit: float) -> str:
    return "" if value is None else f"{value['mean'] / unit:,.0f}"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    line = "|" + "|".join([" --- ", *(" ---: " for _ in head[1:])]) + "|"
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]
