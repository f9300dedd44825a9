"""The verdict, and the diagnosis as text for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradientspace.plain_text import one_line
from gradientspace.tables import render

_SHOWN = 5


def gains(compared: dict[str, Any] | None, least: float) -> bool:
    """Is a comparison's difference (None: not made) below zero, interval and mean over tokens alike, by `least` nats?

    The interval speaks of other samples only: another order of training moves a loss by some thousandths, too.
    """
    if compared is None:
        return False
    difference = compared["difference"]
    return difference["high"] < 0 and difference["mean"] <= -least and compared["token_difference"] < 0


def pulling_against(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """The named sources whose pull on the others lies below zero, interval and all; the strongest first."""
    against = [row for row in evidence["sources"]["pulls"] if row["name"] and row["pull_on_others"]["high"] < 0]
    return sorted(against, key=lambda row: row["pull_on_others"]["mean"])


def conclude(evidence: dict[str, Any]) -> dict[str, Any]:
    """Add `verdict` (keep, split or fix), `headline` and `sentences`, each with its evidence and uncertainty.

    Split only where the pilot gains; fix only where the other sources gain from a training without one.
    """
    pilot, least = evidence["pilot"], evidence["min_gain"]
    sentences = _of_the_pilot(pilot, evidence["k_reason"], least)
    if gains(pilot, least):
        return {**evidence, "verdict": "split", "headline": f"Split into {evidence['k']}.", "sentences": sentences}
    left_out = {row["name"]: row for row in evidence["left_out"]}
    sentences += [_of_a_source(row, left_out.get(row["name"]), least) for row in pulling_against(evidence)]
    harmful = [one_line(name, 40) for name, row in left_out.items() if gains(row["others"], least)]
    verdict, headline = ("fix", f"Drop or fix {', '.join(harmful)}.") if harmful else ("keep", "Keep one adapter.")
    return {**evidence, "verdict": verdict, "headline": headline, "sentences": sentences}


def _of_the_pilot(pilot: dict[str, Any] | None, k_reason: str, least: float) -> list[str]:
    if pilot is None:
        return [f"The gradients show no groups that pull apart: {k_reason}."]
    d = pilot["difference"]
    outcome = "gain" if d["high"] < 0 else "lose" if d["low"] > 0 else "make no clear difference"
    sentences = [
        f"In a pilot of {pilot['steps']} steps, {pilot['n_groups']} routed experts ({pilot['grouping']}) "
        f"{outcome}: {d['mean']:+.4f} nats of dev loss against one adapter "
        f"(95 % interval {d['low']:+.4f} to {d['high']:+.4f})."
    ]
    if d["high"] < 0 and pilot["token_difference"] >= 0:
        sentences.append("The mean over tokens does not show the same gain, so it is not one.")
    elif d["high"] < 0 and not gains(pilot, least):
        sentences.append(f"Less than {least:g} nats (diagnosis.min_gain) are not worth {pilot['n_groups']} adapters.")
    return sentences


def _of_a_source(row: dict[str, Any], left_out: dict[str, Any] | None, least: float) -> str:
    """What a source's gradients and a training without it say, and what that does not show."""
    name, pull = one_line(row["name"], 40), row["pull_on_others"]
    said = (
        f"The gradients of {name} pull against the rest of the mix (mean inner product {pull['mean']:+.4f}, "
        f"{pull['low']:+.4f} to {pull['high']:+.4f}, {row['n']} rows)"
    )
    others = left_out and left_out["others"]
    if not others:
        return f"{said}; a training without it was not tried, so whether it does harm is open."
    d = others["difference"]
    measured = f"{d['mean']:+.4f} nats (95 % interval {d['low']:+.4f} to {d['high']:+.4f}, {others['n']} dev rows)"
    if gains(others, least):
        return f"{said}, and the other sources learn better without it: {measured}."
    return f"{said}, but a training without it does not show that the others would gain: {measured}. Look at its rows."


def text(found: dict[str, Any], folder: Path) -> str:
    """The whole diagnosis for the terminal, the verdict first."""
    lines = [found["headline"], *found["sentences"], ""]
    lines += [f"K tried: {found['k']} ({found['k_reason']})."]
    lines += [f"{100 * found['negative_pairs']:.0f} % of the pairs of {found['n_samples']} samples pull apart.", ""]
    lines += ["Held-out routed alignment, x 1e-3 (orders groupings at equal K only):", render(*_alignment(found)), ""]
    if len(found["sources"]["names"]) > 1:
        lines += ["Cosines between the sources' mean gradients:", render(*_cosines(found)), ""]
    lines += ["By K:", render(*_by_k(found)), ""]
    lines += _suspicious(found["suspicious"])
    lines += ["", f"files    {folder / 'diagnosis.json'}"]
    return "\n".join(lines)


def _alignment(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in found["alignment"]:
        unit, gain = row["unit_step"], row["over_one_adapter"]
        interval = "" if row["name"] == "one adapter" else f"{1e3 * gain['low']:+.0f} to {1e3 * gain['high']:+.0f}"
        rows.append([row["name"], str(row["n_groups"]), f"{1e3 * unit['mean']:.0f}", interval,
                     f"{1e3 * row['first_order']['mean']:.1f}"])  # fmt: skip
    return ["grouping", "K", "unit step", "over one adapter", "first order"], rows


def _cosines(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = [one_line(name, 16) or "no source" for name in found["sources"]["names"]]
    cells = [["" if v is None else f"{v:+.2f}" for v in row] for row in found["sources"]["cosines"]]
    return ["", *names], [[name, *row] for name, row in zip(names, cells, strict=True)]


def _by_k(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = zip(found["stability"], found["variance"], found["embeddings_against_gradients"], strict=True)
    rows = [
        [str(s["n_clusters"]), f"{s['mean']:.2f} ({s['low']:.2f} to {s['high']:.2f})", f"{100 * v['share']:.1f} %",
         f"{e['ari']:.2f}"] for s, v, e in columns
    ]  # fmt: skip
    return ["K", "stability", "held-out variance between groups", "embedding against gradient clusters (ARI)"], rows


def _suspicious(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['found']} of {found['examined']} rows fight everything (likely mislabelled or off-template):"]
    for row in found["rows"][:_SHOWN]:
        lines.append(f"  {one_line(row['id'], 30)}, row {row['row']}, {row['deviations']:.1f} deviations: "
                     f"{one_line(row['prompt'], 60)} -> {one_line(row['response'], 50)}")  # fmt: skip
    if found["found"] > _SHOWN:
        lines.append(f"  and {found['found'] - _SHOWN} more in diagnosis.json")
    return lines if found["found"] else ["No row stands out as fighting everything."]
