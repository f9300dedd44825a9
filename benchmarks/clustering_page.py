"""The measured part of docs/clustering.md, and its figure, from `results/clustering.json`.

python benchmarks/clustering.py --json benchmarks/results/clustering.json
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from wording import read

FIGURE = Path(__file__).resolve().parent.parent / "docs/clustering.svg"

SHOWN = {
    "ceiling": ("ceiling", "ari final"),
    "svd, one pass": ("online, svd", "ari one pass"),
    "svd, final": ("online, svd", "ari final"),
    "running, one pass": ("online, running", "ari one pass"),
    "running, final": ("online, running", "ari final"),
    "MiniBatch": ("MiniBatchKMeans", "ari final"),
    "RP 8192": ("projection 8192, k-means", "ari final"),
    "RP 512": ("projection 512, k-means", "ari final"),
    "RP 512, BIRCH": ("projection 512, BIRCH", "ari final"),
}
FREE = ("drift", "outliers")  # reported without a floor
RAREST = 10


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def ari(cell: dict[str, Any], name: str) -> float:
    method, kind = SHOWN[name]
    return cell["methods"][method][kind]


def quality(cells: dict[str, Any]) -> str:
    rows = [[name, f"{cell['n']:,}", *(f"{ari(cell, m):.2f}" for m in SHOWN)] for name, cell in cells.items()]
    return "**Agreement with the truth** (adjusted Rand).\n\n" + table(["setting", "N", *SHOWN], rows)


def floors(cells: dict[str, Any], method: str) -> dict[str, Any]:
    """Share of the ceiling in the cells that count: median of all, least of those without rare clusters."""
    counted = {
        name: ari(cell, method) / ari(cell, "ceiling")
        for name, cell in cells.items()
        if not name.startswith(FREE) and ari(cell, "ceiling") > 0.5
    }
    common = {name: value for name, value in counted.items() if cells[name]["rarest_in_validation"] >= RAREST}
    worst = min(common, key=lambda name: common[name])
    behind = {
        name: ari(cell, method) - ari(cell, "RP 8192") for name, cell in cells.items() if not name.startswith(FREE)
    }
    last = min(behind, key=lambda name: behind[name])
    return {
        "median": statistics.median(counted.values()), "cells": len(counted), "least": common[worst], "worst": worst,
        "behind": behind[last], "behind_in": last,
    }  # fmt: skip


def summary(cells: dict[str, Any]) -> str:
    lines = []
    for method in ("svd, one pass", "svd, final", "running, one pass", "running, final"):
        f = floors(cells, method)
        lines.append(
            f"- {method}: median {f['median']:.3f} of the ceiling over the {f['cells']} stationary settings whose "
            f"ceiling is above 0.5; least {f['least']:.3f} ({f['worst']}) where the rarest cluster has {RAREST} or "
            f"more expected validation samples; against RP 8192 at worst {f['behind']:+.3f} ({f['behind_in']})."
        )
    return "\n".join(lines)


def spent(cells: dict[str, Any]) -> str:
    name = "D 100,000"
    rows = [
        [method, f"{values['seconds']:.1f}", *(f"{values[key] / 2**20:,.0f}" for key in ("bytes", "peak_bytes"))]
        for method, values in cells[name]["methods"].items()
    ]
    text = (
        f"**Seconds and memory** at {name} (N = {cells[name]['n']:,}, K = {cells[name]['n_clusters']}, one thread). "
        "Held is what a method has to keep of a stream; the peak is what the process grew by, copies of the rows "
        "included, which all lie in memory here."
    )
    return text + "\n\n" + table(["method", "seconds", "MiB held", "MiB peak"], rows)


def options(cells: dict[str, Any]) -> str:
    variants = list(next(iter(cells.values()))["ari"])
    rows = [
        [v, *(f"{c['ari'][v]['one pass']:.2f} / {c['ari'][v]['final']:.2f}" for c in cells.values())] for v in variants
    ]
    seeds = next(iter(cells.values()))["seeds"]
    text = f"**Options**: adjusted Rand of the one pass / under the final centroids, mean of {seeds} seeds."
    return text + "\n\n" + table(["option", *cells], rows)


def n_clusters(cells: dict[str, Any]) -> str:
    rows = [
        [
            name,
            str(cell["draws"]),
            f"{100 * cell['right']:.0f} %",
            ", ".join(f"{k}: {n}" for k, n in cell["answers"].items()),
        ]
        for name, cell in cells.items()
    ]
    first = next(iter(cells.values()))
    text = f"**K from the spectrum** of {first['n']} rows, D = {first['dim']:,}; None is *undetermined*."
    return text + "\n\n" + table(["setting", "draws", "right", "answers"], rows)


def subspace(cells: dict[str, Any]) -> str:
    rows = [[name, f"{c['frozen degrees']:.1f}", f"{c['running degrees']:.1f}"] for name, c in cells.items()]
    first = next(iter(cells.values()))
    text = (
        f"**Largest angle to the offline subspace** in degrees, over the true rank, N = {first['n']:,}, "
        f"D = {first['dim']:,}: the basis of 512 validation rows, and a running SVD of the whole stream."
    )
    return text + "\n\n" + table(["setting", "validation basis", "running SVD"], rows)


def length(cells: dict[str, Any]) -> str:
    (cell,) = cells.values()
    orders = {name: value for name, value in cell.items() if isinstance(value, dict)}
    rows = [[name, f"{v['ari']:.3f}", f"{v['nmi_with_length']:.4f}"] for name, v in orders.items()]
    text = "**Length**: what it tells of a row's cluster (normalised mutual information) where short rows are noisier."
    return text + "\n\n" + table(["order of the stream", "adjusted Rand with truth", "information"], rows)


def cost(cells: dict[str, Any]) -> str:
    beside, memory = cells["time beside the gradients"], cells["memory"]
    grown = ", ".join(f"N = {int(n):,}: {size / 2**20:.1f} MiB" for n, size in memory["grown_bytes"].items())
    threads = f"{beside['threads']} thread{'s' if beside['threads'] > 1 else ''}"
    return (
        f"**Cost.** At D = {beside['dim']:,}, K = 8 a gradient takes {beside['gradient_ms']:.1f} ms, clustering it "
        f"{beside['clustering_ms']:.2f} ms: {100 * beside['share']:.1f} % ({beside['n']} samples of "
        f"{beside['tokens']} tokens, {threads}). Resident memory grew along the stream by {grown}."
    )


def recluster(cells: dict[str, Any]) -> str:
    (again,) = cells.values()
    return (
        f"**Again from coordinates.** {again['n']:,} samples at q = {again['n_components']}: {again['seconds']:.1f} s "
        f"for K = {again['n_clusters']}, {again['stability_seconds']:.1f} s more for its stability, on one thread."
    )


def preconditioning(cells: dict[str, Any]) -> str:
    names = {"rows": "as they are", "adam": "divided by the root of the second moment"}
    rows = [
        [names[name], f"{cell['energy_of_64']:.3f}"]
        + [f"{cell[k]['stability']:.2f} / {cell[k]['ari_with_domain']:.2f}" for k in ("K 4", "K 8")]
        for name, cell in cells.items()
    ]
    n = next(iter(cells.values()))["n"]
    text = f"**Preconditioning**: {n:,} real gradients; stability of plain clusters / agreement with the domain labels."
    return text + "\n\n" + table(["gradients", "energy of 64 directions", "K = 4", "K = 8"], rows)


def draw() -> None:
    """Adjusted Rand against cosine, one panel a kind of noise."""
    cells = read("clustering")["quality"]
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "clustering"
    import matplotlib.pyplot as plt

    panels = {
        "gradients as noise, K = 4": "real noise, K 4",
        "gradients as noise, K = 8": "real noise, K 8",
        "isotropic noise, D = 100,000, K = 8": "D 100,000",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2), sharey=True)
    styles = {"ceiling": "k--", "running, one pass": "o-", "svd, one pass": "s-", "RP 8192": "^:", "RP 512": "v:"}
    for axis, (title, start) in zip(axes, panels.items(), strict=True):
        chosen = sorted((c for n, c in cells.items() if n.startswith(start)), key=lambda c: c["cosine"])
        for name, style in styles.items():
            axis.plot([c["cosine"] for c in chosen], [ari(c, name) for c in chosen], style, label=name)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("cosine within a cluster")
    axes[0].set_ylabel("adjusted Rand")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def part() -> str:
    """Every section that has been measured."""
    results = read("clustering")
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    parts = [
        f"Measured on {machine['processor']}; {versions}; {machine['date']}.",
        quality(results["quality"]),
        summary(results["quality"]),
        f"![adjusted Rand against cosine]({FIGURE.name})",
        spent(results["quality"]),
    ]
    # A section that has not been measured on this machine is absent, never made up.
    parts += [show(results[name]) for name, show in SECTIONS.items() if results.get(name)]
    return "\n\n".join(parts)


SECTIONS = {
    "options": options,
    "preconditioning": preconditioning,
    "n_clusters": n_clusters,
    "subspace": subspace,
    "length": length,
    "cost": cost,
    "recluster": recluster,
}
