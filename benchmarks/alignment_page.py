"""The measured parts on held-out routed alignment, from `results/alignment.json` and `results/ranking.json`."""

from __future__ import annotations

from wording import interval, measured_on, paragraph, read, table

METRICS = {"first_order": "first order", "unit_step": "unit step", "in_loss": "in loss"}


def alignments() -> str:
    """Every grouping at every K: mean and 95 % interval over seeds, times 1,000."""
    found = read("alignment")
    rows = [
        [str(row["k"]), row["grouping"], *(interval(row[metric], "{:.1f}") for metric in METRICS)]
        for row in found["table"]
    ]
    seeds = f"{len(found['seeds'])} seeds, each with its own splits, warm-up and clusters"
    around = f"`{found['config']}`, {seeds}; mean and 95 % t-interval."
    return "\n\n".join(
        [table(["K", "grouping", *METRICS.values()], rows), paragraph(f"{around} {measured_on(found['machine'])}")]
    )


def ranking() -> str:
    """Does alignment order groupings as the loss after training does? Rank correlations, then the groupings by loss."""
    found = read("ranking")
    correlations = [
        [label, *(interval(value[metric], "{:+.2f}") for metric in METRICS)]
        for label, value in found["spearman"].items()
    ]
    arms = sorted(found["arms"], key=lambda arm: (arm["k"], arm["dev_loss"]))
    losses = [
        [str(arm["k"]), arm["grouping"], f"{arm['dev_loss']:.4f}", *(f"{arm[metric]:.1f}" for metric in METRICS)]
        for arm in arms
    ]
    return "\n\n".join(
        [
            table(["groupings compared", *METRICS.values()], correlations),
            table(["K", "grouping", "`dev` loss after training", *METRICS.values()], losses),
            paragraph(f"`{found['config']}`, seed {found['seed']}. {measured_on(found['machine'])}"),
        ]
    )
