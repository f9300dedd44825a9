"""The README's result, from `results/demo.json`.

gradientspace compare runs/demo/config.yaml --seeds 3 --evaluation.baselines '[random, embedding, single-long]' \\
    --json benchmarks/results/demo.json
"""

from __future__ import annotations

from typing import Any

from results_table import RESULTS, read_table
from wording import interval, paragraph, read
from wording import table as markdown

SHOWN = {"single": "one LoRA on the mix", "single-long": "one LoRA, four times the tokens",
         "random": "random groups", "embedding": "embedding clusters",
         "gradientspace": "**GradientSpace, routed**", "oracle": "best expert a prompt (oracle)"}  # fmt: skip

MAIN = {"single": "one LoRA on the mix", "single-wide": "one LoRA of K times the rank", "random": "random groups",
        "embedding": "embedding clusters", "elrea": "ELREA (projected gradients, ensemble)",
        "source": "the true sources (oracle groups)", "gradientspace": "**GradientSpace, routed**"}  # fmt: skip


def part() -> str:
    """Table and verdict."""
    table = read_table(RESULTS / "demo.json")
    methods, gain = table["methods"], table["methods"]["gradientspace"]["difference"]["exact_match"]
    seeds = len(table["seeds"])
    n = methods["single"]["overall"]["n"]
    rows = [
        f"| {label} | {100 * methods[name]['overall']['exact_match']['mean']:.1f} % "
        f"| {methods[name]['overall']['loss']['mean']:.3f} |"
        for name, label in SHOWN.items()
    ]
    ours, embedding = table["clustering"], table["groupings"]["embedding"]
    return "\n".join(
        [
            f"On the demo's {n:.0f} test prompts (four skills crossed with four topics, equal training tokens, "
            f"{'one seed' if seeds == 1 else f'mean of {seeds} seeds'}):",
            "",
            "| | exact match | loss |",
            "|---|---|---|",
            *rows,
            "",
            f"Routed minus one LoRA: {100 * gain['mean']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to "
            f"{100 * gain['high']:+.1f} (paired bootstrap). Gradient clusters agree with the skills (adjusted Rand "
            f"{rand(ours, 'domain')}; with the topics {rand(ours, 'source')}), "
            f"embedding clusters with the topics ({rand(embedding, 'source')}; with the skills "
            f"{rand(embedding, 'domain')}).",
            "",
            wordings(),
        ]
    )


def wordings() -> str:
    """Where the gain is: in wordings that training never used."""
    found = read("demo-wordings")["exact_match"]
    familiar, new = ({m: f"{100 * v:.1f} %" for m, v in found[part].items()} for part in ("familiar", "new"))
    return paragraph(
        "Half of these prompts ask in wordings that training never used, and that is where the gain is. There one LoRA "
        f"is right on {new['single']}, with four times the tokens on {new['single-long']}, routed experts on "
        f"{new['gradientspace']}; in familiar wordings on {familiar['single']}, {familiar['single-long']} and "
        f"{familiar['gradientspace']}."
    )


def rand(grouping: dict[str, Any], label: str) -> str:
    return f"{grouping['agreement'][label]['ari']['mean']:.2f}"


def real_mix() -> str:
    """The main table in short: every baseline's loss, and ours minus it."""
    found = read_table(RESULTS / "real-mix.json")
    methods, pairs = found["methods"], found["comparisons"]
    rows = []
    for name, label in MAIN.items():
        pair = pairs.get(f"gradientspace - {name}")
        cells = [interval(pair["loss"]), "yes" if pair["clear"] else "no"] if pair else ["", ""]
        passes = methods[name]["passes_per_token"]["mean"]
        rows.append([label, f"{methods[name]['overall']['loss']['mean']:.4f}", f"{passes:g}", *cells])
    n, seeds = methods["single"]["overall"]["n"], len(found["seeds"])
    around = (
        f"On {n:.0f} test prompts of a real mix (code, creative writing, finance, maths), equal training tokens, mean "
        f"of {seeds} seeds; loss in nats, and the routed loss minus that of each, with 95 % intervals. *Clear* asks "
        "for more than the interval: every seed, and the mean over tokens too."
    )
    head = ["", "loss", "passes a token", "routed minus it", "clear"]
    return "\n\n".join([paragraph(around), markdown(head, rows), headline()])


def headline() -> str:
    """The pairs that matter most, on more seeds."""
    found = read_table(RESULTS / "real-mix-headline.json")
    parts = []
    for name, label in (("single", "one LoRA"), ("elrea", "ELREA"), ("embedding", "embedding clusters")):
        pair = found["comparisons"][f"gradientspace - {name}"]
        parts.append(f"{interval(pair['loss'])} against {label} ({'clear' if pair['clear'] else 'not clear'})")
    return paragraph(f"The same three pairs over {len(found['seeds'])} seeds: {', '.join(parts)}.")
