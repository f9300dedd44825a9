"""The figures of one run, each a function from its record to a chart, or to None where the run does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradientspace.conflict import group_cosines
from gradientspace.plain_text import one_line
from gradientspace.report.charts import (
    ACCENT,
    INK,
    MUTED,
    Chart,
    bar_axes,
    colour_of,
    draw,
    end_labels,
    heatmap,
    log_scale,
)
from gradientspace.report.record import RunRecord

_NAME = 24
_SPECTRUM = 32
_SOURCES = 11
_BINS = 10
_SHARES = np.linspace(0.05, 1.0, 20)
_FEWEST = 2
"""Validation samples a group needs before anything is said of its mean gradient."""
_LARGEST_HEATMAP = 24


def short(name: str) -> str:
    """A label from data, short enough for an axis."""
    text = one_line(name[: 4 * _NAME])
    return text if len(text) <= _NAME else f"{text[: _NAME - 1].rstrip()}…"


def differences(record: RunRecord) -> Chart | None:
    """Every method's loss minus that of one LoRA, with its interval."""
    if record.results is None:
        return None
    pairs = record.results["comparisons"].items()
    found = [(pair.split(" - ")[0], value["loss"]) for pair, value in pairs if pair.endswith(" - single")]
    return intervals(
        "differences", "Loss against one LoRA", found, "loss minus that of one LoRA, nats", "gradientspace"
    )


def intervals(
    name: str, title: str, found: Sequence[tuple[str, dict[str, float]]], axis: str, ours: str | None = None
) -> Chart | None:
    """Means with their 95 % intervals, one row each, about zero; `ours` stands out, or all do."""
    if not found:
        return None

    def paint(axes: Any) -> None:
        for i, (label, d) in enumerate(found):
            colour = ACCENT if ours in (label, None) else MUTED
            axes.plot([d["low"], d["high"]], [i, i], color=colour, solid_capstyle="round", lw=2.2)
            axes.plot(d["mean"], i, "o", color=colour, ms=5)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_yticks(range(len(found)), [label for label, _ in found])
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_xlabel(axis)
        axes.locator_params(axis="x", nbins=5)
        bar_axes(axes)

    text = "; ".join(f"{label} {d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})" for label, d in found)
    return draw(
        name, title, f"Paired differences in nats with 95 % intervals: {text}.", ["", "mean", "low", "high"],
        [[label, d["mean"], d["low"], d["high"]] for label, d in found], paint, height=0.8 + 0.3 * len(found),
    )  # fmt: skip


def cluster_sources(record: RunRecord) -> Chart | None:
    """Samples of every cluster by source, as stacked bars."""
    if record.sources is None:
        return None
    names, counts = source_counts(record.sources, record.clusters, record.n_clusters)

    def paint(axes: Any) -> None:
        left = np.zeros(record.n_clusters)
        for j, name in enumerate(names):
            axes.barh(range(record.n_clusters), counts[:, j], left=left, color=colour_of(j), height=0.7, label=name)
            left += counts[:, j]
        axes.set_yticks(range(record.n_clusters), [str(k) for k in range(record.n_clusters)])
        axes.set_ylabel("cluster")
        axes.set_xlabel("samples")
        bar_axes(axes)
        axes.figure.legend(loc="outside upper left", ncols=_legend_columns(names), fontsize=6.5, handlelength=0.8)

    return draw(
        "cluster-sources", "Samples of every cluster, by source",
        f"Stacked bars: {record.n_clusters} clusters and {len(names)} sources; their numbers are in the list above.",
        ["cluster", *names], [[k, *counts[k].tolist()] for k in range(record.n_clusters)], paint,
        height=0.9 + 0.24 * record.n_clusters,
    )  # fmt: skip


def _legend_columns(names: Sequence[str]) -> int:
    """As many as fit the figure's width, which holds some fifty letters beside the handles; at most four."""

    def fits(n: int) -> bool:
        rows = -(-len(names) // n)
        widths = [max(map(len, names[i : i + rows])) + 4 for i in range(0, len(names), rows)]
        return sum(widths) <= 56

    return next((n for n in (4, 3, 2) if n <= len(names) and fits(n)), 1)


def source_groups(sources: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names, largest first, and the number (N,) of every sample's source; beyond eleven the smaller ones are one."""
    found, number, sizes = np.unique(np.asarray(sources, dtype=object), return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    place = np.empty(len(order), dtype=int)
    place[order] = np.arange(len(order))
    names = [short(str(found[i])) or "no source" for i in order[:_SOURCES]]
    if len(order) > _SOURCES:
        names.append(f"{len(order) - _SOURCES} others")
    return names, np.minimum(place[number], _SOURCES)


def source_counts(sources: Sequence[str], clusters: np.ndarray, n_clusters: int) -> tuple[list[str], np.ndarray]:
    """Names and counts (K, S) of samples."""
    names, number = source_groups(sources)
    counts = np.zeros((n_clusters, len(names)), dtype=int)
    kept = clusters >= 0
    np.add.at(counts, (clusters[kept], number[kept]), 1)
    return names, counts


def spectrum(record: RunRecord) -> Chart | None:
    """Energy of the leading directions, beside that of sign-flipped noise where it was computed."""
    found = (record.clustering or {}).get("spectrum")
    if not found or not found.get("singular_values"):
        return None
    estimate = found.get("estimate") or {}
    values = (np.asarray(found["singular_values"]) ** 2)[:_SPECTRUM]
    null = np.asarray(estimate.get("null_spectrum", []))[: len(values)]
    kept = found["components"]

    def paint(axes: Any) -> None:
        ranks = np.arange(1, len(values) + 1)
        axes.plot(ranks, values, "o-", ms=3, color=ACCENT)
        lines = [(float(len(values)), float(np.log10(values[-1])), "gradients", ACCENT)]
        if len(null):
            axes.plot(ranks[: len(null)], null, color=MUTED, ls="--")
            lines.append((float(len(null)), float(np.log10(null[-1])), "noise", MUTED))
        if kept <= len(values):
            axes.axvline(kept + 0.5, color=MUTED, lw=0.8, ls=":")
        log_scale(axes)
        axes.set_xlabel("direction")
        axes.set_ylabel("eigenvalue")
        for x, y, text, colour in lines:
            axes.annotate(text, (x, 10**y), xytext=(4, 0), textcoords="offset points", color=colour, fontsize=7)
        axes.set_xlim(0, len(values) * 1.28)

    rows = [[i + 1, v, null[i] if i < len(null) else ""] for i, v in enumerate(values.tolist())]
    return draw(
        "spectrum", "Spectrum of the validation gradients",
        f"Eigenvalues of the leading {len(values)} directions, falling from {values[0]:.2f} to {values[-1]:.2f}; "
        f"{kept} directions were kept.",
        ["direction", "eigenvalue", "sign-flipped noise (median)"], rows, paint,
    )  # fmt: skip


def sweep(record: RunRecord) -> Chart | None:
    """Stability of coordinate clusterings over K."""
    if not record.sweep:
        return None
    ks = [row["n_clusters"] for row in record.sweep]
    mean = [row["stability"]["mean"] for row in record.sweep]
    low = [row["stability"]["low"] for row in record.sweep]
    high = [row["stability"]["high"] for row in record.sweep]

    def paint(axes: Any) -> None:
        axes.fill_between(ks, low, high, color=ACCENT, alpha=0.18, lw=0)
        axes.plot(ks, mean, "o-", ms=3, color=ACCENT)
        if record.n_clusters in ks:
            axes.axvline(record.n_clusters, color=MUTED, lw=0.8, ls=":")
        axes.set_ylim(min(0.0, *low), 1.02)
        axes.set_xlabel("K")
        axes.set_ylabel("adjusted Rand between reruns")

    rows = [[k, row["between"], m, a, b]
            for k, row, m, a, b in zip(ks, record.sweep, mean, low, high, strict=True)]  # fmt: skip
    return draw(
        "sweep", "Stability over K", f"Agreement of reruns for K from {ks[0]} to {ks[-1]}; 1 is the same every time.",
        ["K", "between share", "stability", "low", "high"], rows, paint,
    )  # fmt: skip


def source_conflict(record: RunRecord) -> Chart | None:
    """Cosines between the mean gradients of the named sources."""
    if record.gram is None or record.fit is None or record.sources is None:
        return None
    source_of = dict(zip(record.fit["id"].to_pylist(), record.sources, strict=True))
    return _conflict(record, [source_of.get(i, "") for i in record.gram[0]], "conflict-sources", "sources")


def cluster_conflict(record: RunRecord) -> Chart | None:
    """Cosines between the mean gradients of the clusters."""
    if record.gram is None or record.assignments is None:
        return None
    cluster_of = dict(zip(record.assignments["id"].to_pylist(), record.clusters.tolist(), strict=True))
    labels = [cluster_of.get(i, -1) for i in record.gram[0]]
    return _conflict(record, [str(k) if k >= 0 else "" for k in labels], "conflict-clusters", "clusters")


def _conflict(record: RunRecord, labels: Sequence[str], name: str, what: str) -> Chart | None:
    assert record.gram is not None
    counts = {label: labels.count(label) for label in set(labels) if label}
    groups = sorted((g for g, n in counts.items() if n >= _FEWEST), key=lambda g: (len(g), g))
    if not 2 <= len(groups) <= _LARGEST_HEATMAP:
        return None
    number = {group: i for i, group in enumerate(groups)}
    cosines = group_cosines(record.gram[1], np.array([number.get(label, -1) for label in labels]), len(groups))
    return conflict_chart(name, what, [short(g) for g in groups], cosines)


def conflict_chart(name: str, what: str, groups: Sequence[str], cosines: np.ndarray) -> Chart:
    """Heatmap of cosines (S, S); also used by `diagnose`."""
    texts = [[f"{v:+.2f}".replace("+1.00", "1") for v in row] for row in cosines]
    known = [(cosines[i, j], a, b) for i, a in enumerate(groups) for j, b in enumerate(groups[:i])
             if np.isfinite(cosines[i, j])]  # fmt: skip
    worst = min(known, default=None)
    summary = f" The two that pull apart most: {worst[1]} and {worst[2]}, {worst[0]:+.2f}." if worst else ""
    return draw(
        name, f"Between {what}", f"Cosines between the mean gradients of {len(groups)} {what}.{summary}",
        ["", *groups], [[g, *("" if np.isnan(v) else float(v) for v in row)]
                        for g, row in zip(groups, cosines, strict=True)],
        lambda axes: heatmap(axes, cosines, groups, groups, colours="RdBu", low=-1, high=1, texts=texts),
        height=0.9 + 0.26 * len(groups),
    )  # fmt: skip


def training_curves(record: RunRecord) -> Chart | None:
    """Training loss of the shared adapter, of one LoRA that goes on from it, and of every expert."""
    stages = {s: t["losses"] for s, t in record.training.items() if t["losses"]}
    curves = [s for s in stages if s in ("shared", "single") or s.startswith("experts/")]
    if not curves:
        return None
    offset = record.training["shared"]["steps"] if "shared" in record.training else 0
    lines: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for stage in curves:
        start = 0 if stage == "shared" else offset
        x = np.array([p["step"] for p in stages[stage]]) + start
        y = np.array([p["loss"] for p in stages[stage]])
        k = int(stage.split("/")[1]) if stage.startswith("experts/") else None
        name = {"shared": "shared", "single": "one LoRA"}.get(stage, str(k))
        lines.append((name, INK if stage == "single" else MUTED if k is None else colour_of(k), x, y))

    def paint(axes: Any) -> None:
        for name, colour, x, y in lines:
            thick = 1.8 if name == "one LoRA" else 1.2
            axes.plot(x, y, color=colour, lw=thick, marker="o" if len(x) == 1 else "", ms=3)
        top, bottom = np.max([y.max() for *_, y in lines]), np.min([y.min() for *_, y in lines])
        if top > 8 * max(bottom, 1e-6):
            log_scale(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats a token")
        axes.set_xlim(0, max(x[-1] for *_, x, _ in lines) * 1.18)
        if axes.get_yscale() == "linear":
            end_labels(axes, [(x[-1], y[-1], name, colour) for name, colour, x, y in lines])
        else:
            for name, colour, x, y in lines:
                axes.annotate(name, (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", va="center",
                              color=colour, fontsize=7)  # fmt: skip

    rows = [[name, int(s), float(v)] for name, _, x, y in lines for s, v in zip(x, y, strict=True)]
    last = "; ".join(f"{f'expert {name}' if name.isdigit() else name} {y[-1]:.3f}" for name, _, _, y in lines)
    return draw(
        "training", "Training loss", f"Last logged losses: {last}.", ["adapter", "step", "loss"], rows, paint,
        height=2.7,
    )  # fmt: skip


def confusion(record: RunRecord) -> Chart | None:
    """Where prompts of each gradient cluster are routed, in shares of the cluster."""
    if record.samples is None or record.n_clusters < 2 or record.n_clusters > _LARGEST_HEATMAP:
        return None
    clusters, experts = (record.samples[c].to_numpy() for c in ("cluster", "expert"))
    k, kept = record.n_clusters, (clusters >= 0) & (experts >= 0)
    counts = np.zeros((k, k), dtype=int)
    np.add.at(counts, (clusters[kept], experts[kept]), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [str(i) for i in range(k)]

    def paint(axes: Any) -> None:
        texts = [[f"{100 * v:.0f}" for v in row] for row in shares]
        heatmap(axes, shares, names, names, colours="Blues", low=0, high=1, texts=texts)
        axes.set_xlabel("routed to expert")
        axes.set_ylabel("cluster of its own gradient")

    return draw(
        "router-confusion", "Routed to, % of each cluster",
        f"{100 * np.trace(counts) / max(1, counts.sum()):.0f} % of the prompts go to the expert of their own cluster.",
        ["cluster", *names], [[i, *counts[i].tolist()] for i in range(k)], paint, height=0.9 + 0.24 * k,
    )  # fmt: skip


def calibration(record: RunRecord) -> Chart | None:
    """How often the router is right, for prompts of which it is equally sure."""
    if record.samples is None or record.n_clusters < 2:
        return None
    clusters, experts, sure = (record.samples[c].to_numpy() for c in ("cluster", "expert", "probability"))
    known = clusters >= 0
    right, sure = (clusters == experts)[known], sure[known]
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    rows = [[float(sure[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum())]
            for b in range(_BINS) if (bins == b).any()]  # fmt: skip
    if not rows:
        return None

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
        x, y, n = (np.array(column) for column in zip(*rows, strict=True))
        axes.plot(x, y, color=ACCENT)
        axes.scatter(x, y, s=10 + 60 * n / n.max(), color=ACCENT, alpha=0.85, lw=0, zorder=3)
        axes.set(xlim=(0, 1.03), ylim=(0, 1.05), xlabel="probability the router gives", ylabel="share it is right")

    return draw(
        "router-calibration", "Calibration", "The share of right routes against the probability given; the dotted "
        "line is perfect calibration, larger dots are more prompts.", ["probability", "right", "prompts"], rows, paint,
    )  # fmt: skip


def coverage(record: RunRecord) -> Chart | None:
    """Loss of the surest share of the prompts, routed and under one LoRA."""
    needed = {"loss:gradientspace", "loss:single", "probability"}
    if record.samples is None or not needed <= set(record.samples.column_names):
        return None
    order = np.argsort(-record.samples["probability"].to_numpy(), kind="stable")
    routed, single = (record.samples[f"loss:{m}"].to_numpy()[order] for m in ("gradientspace", "single"))
    sizes = np.maximum(1, np.round(_SHARES * len(order)).astype(int))
    rows = [[float(s), float(routed[:n].mean()), float(single[:n].mean())]
            for s, n in zip(_SHARES, sizes, strict=True)]  # fmt: skip

    def paint(axes: Any) -> None:
        x, ours, theirs = (np.array(column) for column in zip(*rows, strict=True))
        axes.plot(100 * x, ours, color=ACCENT)
        axes.plot(100 * x, theirs, color=MUTED)
        axes.set(xlabel="surest share of the prompts, %", ylabel="loss, nats", xlim=(0, 124))
        axes.set_xticks([0, 25, 50, 75, 100])
        end_labels(axes, [(100, ours[-1], "routed", ACCENT), (100, theirs[-1], "one LoRA", MUTED)])

    return draw(
        "router-coverage", "Coverage against quality",
        f"Mean loss when only the surest share of the prompts is taken: routed {rows[9][1]:.3f} on half of them and "
        f"{rows[-1][1]:.3f} on all, one LoRA {rows[9][2]:.3f} and {rows[-1][2]:.3f}.",
        ["share of prompts", "routed", "one LoRA"], rows, paint,
    )  # fmt: skip


def expert_domains(record: RunRecord) -> Chart | None:
    """Loss of every expert on every domain."""
    if record.results is None or record.n_clusters < 2 or record.n_clusters > _LARGEST_HEATMAP:
        return None
    table = record.results.get("experts", {}).get("loss_by_domain")
    if not table:
        return None
    domains, values = [short(d) for d in table], np.array(list(table.values()))
    above = values - values.min(axis=1, keepdims=True)
    experts = [str(k) for k in range(values.shape[1])]
    best = "; ".join(f"{d}: expert {int(v.argmin())} ({v.min():.3f})" for d, v in zip(domains, values, strict=True))

    def paint(axes: Any) -> None:
        texts = [[f"{v:.2f}" for v in row] for row in values]
        heatmap(axes, above, domains, experts, colours="BuPu", low=0, high=float(above.max()) or 1.0, texts=texts)
        axes.set_xlabel("expert")

    return draw(
        "expert-domains", "Loss of every expert on every domain", f"Best expert of each domain: {best}.",
        ["domain", *(f"expert {k}" for k in experts)],
        [[d, *v] for d, v in zip(domains, values.tolist(), strict=True)], paint, height=0.8 + 0.3 * len(domains),
    )  # fmt: skip


def stage_costs(record: RunRecord) -> Chart | None:
    """Seconds of every stage, experts and baselines each taken together."""
    if not record.costs:
        return None
    seconds: dict[str, float] = {}
    for stage, cost in record.costs.items():
        parts = stage.split("/")
        group = "/".join(parts[:2]) if parts[0] == "baselines" else parts[0]
        seconds[group] = seconds.get(group, 0.0) + cost["seconds"]

    def paint(axes: Any) -> None:
        axes.barh(range(len(seconds)), list(seconds.values()), color=ACCENT, height=0.62)
        axes.set_yticks(range(len(seconds)), list(seconds))
        for i, value in enumerate(seconds.values()):
            axes.annotate(f"{value:.1f}", (value, i), xytext=(3, 0), textcoords="offset points", va="center",
                          fontsize=7, color=MUTED)  # fmt: skip
        axes.set_xlabel("seconds")
        bar_axes(axes)

    total = sum(seconds.values())
    return draw(
        "cost", "Time", f"{total:.1f} seconds in all; most in {max(seconds, key=lambda s: seconds[s])}.",
        ["stage", "seconds"], [[s, v] for s, v in seconds.items()], paint, height=0.7 + 0.22 * len(seconds),
    )  # fmt: skip
