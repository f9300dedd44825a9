"""The paper's figures from committed results files: a PNG and the CSV of what it shows, in seconds.

    python benchmarks/paper/figures.py

Reads `benchmarks/results/*.json`; a figure whose file is not there yet is named and left out.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from common import BY_METHOD, RESULTS, ROOT, minus_single, read_table

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from gradientspace.files import read_json

FOLDER = ROOT / "docs/figures"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
Rows = list[dict[str, Any]]


def by_domain(folder: Path) -> tuple[Figure, Rows]:
    """Fig. 1: difference in loss from one LoRA, by domain, with 95 % intervals."""
    table = read_table(folder / "real-mix.json")
    methods = [
        name for name, m in table["methods"].items() if name != "base" and "by_domain" in m.get("difference", {})
    ]
    domains = ["overall", *table["domains"]]
    rows: Rows = []
    for name in methods:
        found = table["methods"][name]["difference"]
        for domain in domains:
            value = found["loss"] if domain == "overall" else found["by_domain"][domain]
            rows.append({"method": name, "domain": domain, **{k: value[k] for k in ("mean", "low", "high")}})
    figure, axes = plt.subplots(1, len(domains), figsize=(2.6 * len(domains), 0.3 * len(methods) + 1.2), sharey=True)
    for axis, domain in zip(axes, domains, strict=True):
        shown = [r for r in rows if r["domain"] == domain]
        errors = [[r["mean"] - r["low"] for r in shown], [r["high"] - r["mean"] for r in shown]]
        colours = [COLOURS[1] if r["method"] == "gradientspace" else COLOURS[0] for r in shown]
        axis.barh(methods, [r["mean"] for r in shown], xerr=errors, color=colours, height=0.7)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(domain)
        axis.set_xlabel("nats against single")
    axes[0].invert_yaxis()
    return figure, rows


def similarity(folder: Path) -> tuple[Figure, Rows]:
    """Fig. 4: gradient similarity against embedding similarity of sentence pairs."""
    found = read_json(folder / "similarity.json")
    names = list(found["pairs"])
    rows = [dict(zip(names, values, strict=True)) for values in zip(*found["pairs"].values(), strict=True)]
    figure, axis = plt.subplots(figsize=(5, 4))
    dots = axis.scatter(found["pairs"]["embedding"], found["pairs"]["gradient"], c=found["pairs"]["score"], s=8)
    figure.colorbar(dots, label="human similarity")
    axis.set_xlabel("cosine of embeddings")
    axis.set_ylabel("cosine of gradients")
    spearman = found["correlations"]["gradient with embedding"]["spearman"]
    axis.set_title(f"{found['n']} STS pairs, Spearman {spearman:.2f}")
    return figure, rows


def distribution(folder: Path) -> tuple[Figure, Rows]:
    """Fig. 5: which domains the samples of each cluster come from, first seed."""
    counts = read_table(folder / "real-mix.json")["clustering"]["sizes_by_domain"]
    first = {domain: of_seeds[0] for domain, of_seeds in counts.items()}
    rows = [
        {"cluster": k, "domain": domain, "samples": value}
        for domain, values in first.items()
        for k, value in enumerate(values)
    ]
    figure, axis = plt.subplots(figsize=(6, 3.5))
    below = np.zeros(len(next(iter(first.values()))))
    for colour, (domain, values) in zip(COLOURS, first.items(), strict=False):
        axis.bar(range(len(values)), values, bottom=below, label=domain, color=colour)
        below += values
    axis.set_xlabel("cluster")
    axis.set_ylabel("samples of fit")
    axis.legend(fontsize=8)
    return figure, rows


def spectrum(folder: Path) -> tuple[Figure, Rows]:
    """Singular values of the validation gradients, every seed; what they say about K is in the results file."""
    seeds = read_table(folder / "real-mix.json")["clustering"]["spectrum"]["singular_values"]
    rows = [{"seed": s, "index": i + 1, "value": v} for s, values in enumerate(seeds) for i, v in enumerate(values)]
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for values in seeds:
        axis.plot(range(1, len(values) + 1), values, marker=".", linewidth=0.8)
    axis.set_xlabel("index")
    axis.set_ylabel("singular value")
    axis.set_yscale("log")
    return figure, rows


def ensemble(folder: Path) -> tuple[Figure, Rows]:
    """One expert against an ensemble, and the router against the oracle: paired differences from one LoRA."""
    table = read_table(folder / "real-mix.json")
    names = ["oracle", "nearest-centroid", "gradientspace", "weighted-ensemble", "uniform-ensemble", "elrea"]
    rows: Rows = []
    for name in (n for n in names if n in table["methods"]):
        method = table["methods"][name]
        loss = {k: method["difference"]["loss"][k] for k in ("mean", "low", "high")}
        rows.append({"method": name, "passes": method["passes_per_token"]["mean"], **loss})
    figure, axis = plt.subplots(figsize=(6, 2.8))
    for row in rows:
        # The oracle is a bound: choosing by loss takes all experts and the answer.
        errors = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        colour = COLOURS[1] if row["method"] == "gradientspace" else COLOURS[0]
        label = f"{row['method']} ({row['passes']:g} passes)"
        axis.errorbar(row["mean"], label, xerr=errors, marker="o", color=colour, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("nats against one LoRA")
    return figure, rows


def cost(folder: Path) -> tuple[Figure, Rows]:
    """Milliseconds for one answer: the decision (router or gradient) and the tokens."""
    found = read_json(folder / "inference-cost.json")["methods_cost"]
    rows = [{"method": name, **row} for name, row in found.items()]
    figure, axis = plt.subplots(figsize=(6, 2.2))
    names = [r["method"] for r in rows]
    decide = [r["decide_ms"] for r in rows]
    axis.barh(names, decide, color=COLOURS[1], label="decide")
    axis.barh(names, [r["generate_ms"] for r in rows], left=decide, color=COLOURS[0], label="generate")
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds an answer")
    axis.legend(fontsize=8)
    return figure, rows


def variance(folder: Path) -> tuple[Figure, Rows]:
    """Theorem 2: the variance reduction on held-out gradients beside random groups of the same sizes."""
    rows: Rows = []
    for path in sorted(folder.glob("theory-*.json")):
        found, run = read_json(path)["theorem2"], path.stem.removeprefix("theory-")
        groups = {**found["reduction"], "random": found["random"]["mean"]}
        rows += [{"run": run, "groups": name, "reduction": value} for name, value in groups.items()]
    if not rows:
        raise FileNotFoundError(folder / "theory-*.json")
    figure, axis = plt.subplots(figsize=(5.5, 0.4 * len(rows) + 0.8))
    axis.barh([f"{r['run']}: {r['groups']}" for r in rows], [100 * r["reduction"] for r in rows], color=COLOURS[0])
    axis.invert_yaxis()
    axis.set_xlabel("variance lower than the mixture's (%)")
    return figure, rows


def ablations(folder: Path) -> tuple[Figure, Rows]:
    """Every ablation: loss of each variant's routed experts on dev_b, less that of one adapter."""
    rows: Rows = []
    for path in sorted((folder / "ablations").glob("*.json")):
        found = read_table(path)
        for name in found["methods"]:
            variant, _, kind = name.rpartition("/")
            difference = minus_single(found, name)
            if difference and kind in BY_METHOD.get(path.stem, ("gradientspace",)):
                shown = kind if path.stem in BY_METHOD else variant.split("-dev_b")[0].removeprefix(f"{path.stem}-")
                rows.append(
                    {"item": path.stem, "variant": shown, **{k: difference[k] for k in ("mean", "low", "high")}}
                )
    if not rows:
        raise FileNotFoundError(folder / "ablations")
    items = sorted({r["item"] for r in rows})
    columns = min(4, len(items))
    lines = -(-len(items) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.6 * lines), squeeze=False)
    for axis, item in zip(axes.ravel(), items, strict=False):
        shown = [r for r in rows if r["item"] == item]
        errors = [[r["mean"] - r["low"] for r in shown], [r["high"] - r["mean"] for r in shown]]
        axis.errorbar(range(len(shown)), [r["mean"] for r in shown], yerr=errors, marker="o", linestyle="", capsize=3)
        axis.set_xticks(range(len(shown)), [r["variant"] for r in shown], fontsize=7, rotation=20)
        axis.set_xlim(-0.5, len(shown) - 0.5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"{item}: nats against one LoRA", fontsize=9)
    for axis in axes.ravel()[len(items) :]:
        axis.axis("off")
    return figure, rows


FIGURES: dict[str, Callable[[Path], tuple[Figure, Rows]]] = {
    "fig1-methods": by_domain,
    "fig4-similarity": similarity,
    "fig5-distribution": distribution,
    "spectrum": spectrum,
    "ensemble-and-oracle": ensemble,
    "inference-cost": cost,
    "variance": variance,
    "ablations": ablations,
}


def draw(folder: Path, target: Path) -> list[str]:
    """Draw every figure whose results are there; returns the names of the others."""
    target.mkdir(parents=True, exist_ok=True)
    missing = []
    for name, make in FIGURES.items():
        try:
            figure, rows = make(folder)
        except FileNotFoundError:
            missing.append(name)
            continue
        figure.tight_layout()
        # Without a date or version in it, the same numbers give the same file.
        figure.savefig(target / f"{name}.png", dpi=120, metadata={"Software": None})
        plt.close(figure)
        write_csv(target / f"{name}.csv", rows)
    return missing


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    missing = draw(options.results, options.out)
    for name in missing:
        print(f"{name}: its results are not there yet")
    print(f"{len(FIGURES) - len(missing)} figures in {options.out}")


if __name__ == "__main__":
    main()
