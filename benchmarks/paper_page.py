"""The measured parts of docs/results.md beside its tables: theory, similarity, the cost of an answer, ablations.

make paper, make ablations
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results_table import read_table
from wording import RESULTS, interval, measured_on, paragraph, read, table

PAIRS = {"gradient with embedding": "gradients with embeddings", "gradient with score": "gradients with people",
         "embedding with score": "embeddings with people"}  # fmt: skip
BY_METHOD = {
    "projection": ("gradientspace", "plain", "less", "projection-2048", "projection-512"),
    "compute": ("single", "single-long", "gradientspace"),
}
"""Ablations of one config whose methods are compared, in place of variants."""
METHODS = {"gradientspace": "one routed expert", "weighted-ensemble": "all experts, weighted by the router",
           "elrea": "ELREA"}  # fmt: skip


def theory(name: str = "theory-demo") -> str:
    """Lemma 1, Theorem 2 and, where it was measured, Theorem 3 on a run."""
    found = read(name)
    return "\n\n".join(
        [
            paragraph(
                f"**Lemma 1.** Total variance minus within minus between, {found['theorem2']['n_clusters']} clusters "
                f"of held-out unit gradients in float64: {found['lemma1']['relative_error']:.0e} of the total."
            ),
            *_reduction(found["theorem2"]),
            *(_adapter(found["adapter"]) if "adapter" in found else []),
            paragraph(measured_on(found["machine"])),
        ]
    )


def quadratics() -> str:
    """Theorem 3 where everything is known."""
    return "\n\n".join(_quadratics(read("theory-demo")["quadratics"]))


def _reduction(found: dict[str, Any]) -> list[str]:
    chance = {name: 100 * value for name, value in found["random"].items()}
    rows = [
        ["by the sample's own gradient", f"{100 * found['reduction']['gradient']:.2f}"],
        ["by the router, from the prompt", f"{100 * found['reduction']['routed']:.2f}"],
        ["random groups of the same sizes (mean, least and most of the draws)", interval(chance, "{:.2f}")],
    ]
    words = f"**Theorem 2.** How much lower the groups' average variance is, on {found['n']:,} held-out gradients:"
    return [paragraph(words), table(["groups", "% of the mixture's variance"], rows)]


def _quadratics(found: dict[str, Any]) -> list[str]:
    whole = found["mixture"]
    rows = [
        ["mixture", f"{whole['variance']:.1f}", f"{whole['floor']:.3f}", f"{whole['predicted']:.3f}", "",
         f"{100 * whole['left']:.2f} after {whole['transient_steps']}"],
        *(
            [f"cluster {row['cluster']}", f"{row['variance']:.1f}", f"{row['floor']:.3f}", f"{row['predicted']:.3f}",
             f"{row['mixture_on_this_cluster']:.3f}", f"{100 * row['left']:.2f} after {row['expert_steps']}"]
            for row in found["clusters"]
        ),
    ]  # fmt: skip
    head = ["SGD on", "variance", "floor", "predicted", "on this cluster, SGD on the mixture", "% left after steps"]
    words = (
        "**Theorem 3, planted quadratics.** Squared gradient norm where constant-step SGD settles, what variance, step "
        "and batch predict, and what is left of the first one after the steps of equal total training:"
    )
    return [paragraph(words), table(head, rows)]


def _adapter(found: dict[str, Any]) -> list[str]:
    rows = [
        [str(row["cluster"]), f"{row['samples']:,}", f"{row['noise_ratio']:.2f}", f"{row['own_gradient']:.4f}",
         f"{row['own_gradient_of_mixture']:.4f}"]
        for row in found["clusters"]
    ]  # fmt: skip
    head = ["cluster", "samples", "noise over the mixture's", "squared gradient, SGD on it", "SGD on the mixture"]
    words = (
        f"**Theorem 3, the run's shared adapter.** {found['steps']} steps of constant-step SGD (step {found['step']}, "
        f"batch {found['batch']}). Size-weighted mean of the noise ratio: {found['average_noise_ratio']:.3f}."
    )
    return [paragraph(words), table(head, rows)]


def similarity() -> str:
    """Correlations of gradient similarity, embedding similarity and human judgement."""
    found = read("similarity")
    rows = [
        [label, *(f"{found['correlations'][name][kind]:+.3f}" for kind in ("pearson", "spearman"))]
        for name, label in PAIRS.items()
    ]
    around = f"{found['n']} sentence pairs. {measured_on(found['machine'])}"
    return "\n\n".join([table(["similarity of", "Pearson", "Spearman"], rows), paragraph(around)])


def cost() -> str:
    """Milliseconds and passes of one answer, and each as a multiple of the routed expert's."""
    found = read("inference-cost")
    rows = []
    for name, label in METHODS.items():
        row = found["methods_cost"][name]
        times = row["answer_ms"] / found["methods_cost"]["gradientspace"]["answer_ms"]
        rows.append([label, str(row["passes_per_token"]), f"{row['decide_ms']:.1f}", f"{row['loss_ms']:.1f}",
                     f"{row['generate_ms']:.0f}", f"{times:.1f}x"])  # fmt: skip
    answer = f"{found['new_tokens']} tokens, ms"
    head = ["", "forward passes a token", "deciding, ms", "loss of an answer, ms", answer, "the whole"]
    around = (
        f"Medians of {found['prompts']} prompts of `dev`, one at a time, in one process. Deciding is the router, or "
        f"the prompt's projected gradient. {measured_on(found['machine'])}"
    )
    return "\n\n".join([table(head, rows), paragraph(around)])


def ablations(folder: Path = RESULTS / "ablations") -> str:
    """Every item that was run: losses of the routed experts on dev_b, against one LoRA and the item's first variant.

    Where a variant has embedding clusters beside it, against them too.
    """
    parts = []
    for path in sorted(folder.glob("*.json")):
        found = read_table(path)
        seeds = ", ".join(str(seed) for seed in found["seeds"])
        parts.append(f"**{path.stem}**, seed{'s' if len(found['seeds']) > 1 else ''} {seeds}:")
        parts.append(_by_method(path.stem, found) if path.stem in BY_METHOD else _variants(path.stem, found))
    return "\n\n".join(parts)


def minus_single(found: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Loss of a method minus that of one adapter of its own variant: the paired difference, `None` for that adapter.

    One adapter that is the same in all variants is in the table once, as the first one's.
    """
    variant = name.rpartition("/")[0]
    pair = found["comparisons"].get(f"{name} - {variant}/single") or found["methods"][name].get("difference")
    return pair["loss"] if pair else None


def _variants(item: str, found: dict[str, Any]) -> str:
    pairs, rows = found["comparisons"], []
    names = [name for name in found["methods"] if name.endswith("/gradientspace")]
    embedding = any(name.endswith("/embedding") for name in found["methods"])
    for name in names:
        variant = name.rpartition("/")[0]
        beside = [minus_single(found, name), (pairs.get(f"{name} - {names[0]}") or {}).get("loss")]
        if embedding:
            beside.append(pairs[f"{name} - {variant}/embedding"]["loss"])
        rows.append(
            [
                variant.split("-dev_b")[0].removeprefix(f"{item}-"),
                f"{found['methods'][name]['overall']['loss']['mean']:.4f}",
                *(interval(difference) if difference else "" for difference in beside),
            ]
        )
    head = ["variant", "loss", "minus one LoRA", "minus the first variant"]
    return table(head + ["minus embedding clusters"] * embedding, rows)


def _by_method(item: str, found: dict[str, Any]) -> str:
    """Methods of one config: loss, training tokens, and agreement of their groups with the domains."""
    groupings = {"gradientspace": found["clustering"], **found["groupings"]}
    rows = []
    for name in BY_METHOD[item]:
        method = found["methods"][name]
        single = minus_single(found, name)
        agreement = f"{groupings[name]['agreement']['domain']['ari']['mean']:.3f}" if name in groupings else ""
        rows.append([name, f"{method['overall']['loss']['mean']:.4f}", interval(single) if single else "",
                     f"{method['tokens']['mean']:,.0f}", agreement])  # fmt: skip
    return table(["method", "loss", "minus one LoRA", "training tokens", "adjusted Rand with domain"], rows)
