"""The measured parts of docs/diagnosis.md, from `results/diagnosis.json`."""

from __future__ import annotations

from typing import Any

from wording import interval, measured_on, paragraph, read, table

MIXES = {
    "demo": "the demo",
    "one-skill": "the demo's control with one skill (nothing to split)",
    "gsm8k": "gsm8k's rows alone",
    "real-mix": "the real mix",
}
RANKINGS = {"conflict": "gradient conflict", "loss": "loss", "combined": "both"}


def verdicts() -> str:
    """The pilot's difference and the verdict of every mix."""
    found = read("diagnosis")
    rows = [
        [
            label,
            f"{arm['k']} by {arm['pilot']['grouping']}",
            interval(arm["pilot"]["difference"]),
            f"*{arm['headline'].rstrip('.')}*",
            str(arm["rows_that_stand_out"]),
        ]
        for name, label in MIXES.items()
        if (arm := found["arms"].get(name)) and "pilot" in arm
    ]
    head = ["mix", "tried", "routed experts minus one adapter, nats on `dev`", "verdict", "rows that stand out"]
    wrong = ", ".join(
        f"{label} *{found['arms'][name]['verdict']}*" for name, label in SHUFFLED.items() if name in found["arms"]
    )
    around = f"With wrong answers among the rows, as above, the verdicts are: {wrong}."
    return "\n\n".join([table(head, rows), paragraph(f"{around} {measured_on(found['machine'])}")])


def suspicious() -> str:
    """Precision and recall of the rows that fight everything, where 5 % of the answers were passed around."""
    arms = read("diagnosis")["arms"]
    rows = [row for name, label in SHUFFLED.items() if name in arms for row in found_rows(label, arms[name])]
    return table(["mix and list", "rows", "precision", "recall"], rows)


SHUFFLED = {
    "shuffled": "the demo, seed 0",
    **{f"shuffled-seed{seed}": f"the demo, seed {seed}" for seed in (1, 2, 3, 4)},
    "real-mix-shuffled": "the real mix",
}


def found_rows(label: str, arm: dict[str, Any]) -> list[list[str]]:
    listed = arm["list"]
    return [
        [f"{label}: {arm['shuffled']} wrong rows among {arm['examined']:,}; chance", "", f"{arm['chance']:.3f}", ""],
        *([f"as many as are wrong, by {by}", *shown(arm[f"as_many_by_{name}"])] for name, by in RANKINGS.items()),
        ["**the list as printed**", *shown(listed)],
    ]


def shown(list_of_rows: dict[str, Any]) -> list[str]:
    values = (f"{list_of_rows[name]:.2f}" if name in list_of_rows else "" for name in ("precision", "recall"))
    return [str(list_of_rows["n"]), *values]
