"""What each part of the page says, as plain values for the template: no HTML here, and no figure is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradientspace.data.accounting import REASONS
from gradientspace.files import digest
from gradientspace.plain_text import visible
from gradientspace.report.record import RunRecord

METHODS = {
    "base": "the base model",
    "single": "one LoRA on the mix",
    "single-wide": "one wide LoRA",
    "single-long": "one LoRA with K times the tokens",
    "random": "random groups",
    "embedding": "embedding clusters",
    "tfidf": "clusters of words",
    "source": "the true sources",
    "plain": "plain gradient clusters",
    "less": "clusters of gradients projected to 8,192",
    "projection-2048": "clusters of gradients projected to 2,048",
    "projection-512": "clusters of gradients projected to 512",
    "elrea": "ELREA",
    "gradientspace-paper": "the paper's own recipe",
    "oracle": "the best expert for every prompt",
}


@dataclass(frozen=True)
class Table:
    """A table of the page: a caption for screen readers, column heads, rows of texts."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def verdict(record: RunRecord) -> tuple[str, list[str]]:
    """Headline and sentences: did experts beat one LoRA, by how much, how sure."""
    if record.results is None:
        done = "clustered, not evaluated yet" if record.clustering else "not clustered yet"
        return "No verdict yet", [f"This run is {done}; what is finished is below; the same command goes on."]
    *sentences, last = record.results["verdict"]
    headline = last.removeprefix("Verdict: ").removesuffix(".")
    return headline[:1].upper() + headline[1:], [*sentences, *_against_others(record.results)]


def _against_others(results: dict[str, Any]) -> list[str]:
    """One sentence a baseline: ahead, behind or level, with the interval."""
    sentences = []
    for pair, value in results["comparisons"].items():
        ours, other = pair.split(" - ")
        if ours != "gradientspace" or other == "single":
            continue
        loss = value["loss"]
        where = "ahead of" if loss["high"] < 0 else "behind" if loss["low"] > 0 else "level with"
        sentences.append(
            f"It is {where} {METHODS.get(other, other)}: {loss['mean']:+.4f} nats of loss "
            f"({loss['low']:+.4f} to {loss['high']:+.4f})."
        )
    return sentences


def key_numbers(record: RunRecord) -> list[tuple[str, str]]:
    """A few numbers under the verdict: label, value."""
    found: list[tuple[str, str]] = []
    if record.results is not None:
        methods = record.results["methods"]
        for name, label in (("single", "one LoRA"), ("gradientspace", "routed experts")):
            if name in methods:
                found.append((f"loss, {label}", f"{methods[name]['overall']['loss']:.3f}"))
        for name, label in (("single", "one LoRA"), ("gradientspace", "routed experts")):
            if "exact_match" in methods.get(name, {}).get("overall", {}):
                found.append((f"exact match, {label}", f"{100 * methods[name]['overall']['exact_match']:.1f} %"))
        found.append((f"prompts of {record.results['split']}", f"{methods['base']['overall']['n']:,}"))
    if record.clustering is not None:
        found.append(("clusters", str(record.n_clusters)))
    if record.accounting is not None:
        found.append(("training rows", f"{record.accounting['splits']['fit']:,}"))
    return found


def method_tables(record: RunRecord) -> list[Table]:
    """Loss of every method, and exact match where it was measured: overall and by domain."""
    if record.results is None:
        return []
    methods, domains = record.results["methods"], record.results["domains"]
    shown = domains if len(domains) > 1 else []
    metrics = {"loss": ("Loss in nats", "{:.4f}"), "exact_match": ("Exact match, %", "{:.1f}")}
    tables = []
    for metric, (caption, form) in metrics.items():
        scale = 100 if metric == "exact_match" else 1
        rows = []
        for name, method in methods.items():
            parts = [method["overall"], *(method["by_domain"].get(d, {}) for d in shown)]
            if metric in method["overall"]:
                rows.append([name, *(form.format(scale * p[metric]) if metric in p else "" for p in parts)])
        if rows:
            tables.append(Table(caption, ["method", "overall", *(visible(d, 40) for d in shown)], rows))
    return tables


def choice_of_k(record: RunRecord) -> tuple[list[str], Table | None] | None:
    """Sentences on how K came about and how stable the clusters are, and the criteria with their evidence."""
    facts = record.clustering
    if facts is None:
        return None
    asked, estimate = record.run.config.clustering.n_clusters, record.rank_estimate
    sentences = []
    if estimate is None:
        sentences.append(f"K = {asked} was asked for." if asked != "auto" else f"K = {record.n_clusters}.")
    elif estimate["n_clusters"] is None:
        sentences.append(f"The spectrum does not determine K ({estimate['reason']}); {record.n_clusters} was used.")
    else:
        sentences.append(
            f"K = {estimate['n_clusters']}: {estimate['reason']} (the same answer in "
            f"{100 * estimate['confidence']:.0f} % of subsamples)."
        )
    if (spectrum := facts.get("spectrum")) is not None:
        share = 100 * spectrum["energy_of_components"]
        sentences.append(
            f"The {spectrum['components']} directions kept hold {share:.0f} % of the validation gradients' energy."
        )
    if (stability := facts.get("stability")) is not None:
        sentences.append(
            f"Reruns on halves of the rows agree with adjusted Rand {stability['mean']:.2f} "
            f"({stability['low']:.2f} to {stability['high']:.2f}; 1 is the same clusters every time)."
        )
    if (variance := facts.get("variance")) and variance.get("total"):
        sentences.append(
            f"{100 * variance['between'] / variance['total']:.1f} % of the held-out gradients' variance lies between "
            "the clusters: what a batch of one cluster is less noisy by (Theorem 2)."
        )
    return sentences, _criteria(estimate) if estimate else None


def _criteria(estimate: dict[str, Any]) -> Table:
    rows = []
    for name, evidence in estimate["criteria"].items():
        facts = "; ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in evidence.items()
                          if k != "n_clusters" and not isinstance(v, list | dict))  # fmt: skip
        answer = evidence.get("n_clusters")
        rows.append([name, "undetermined" if answer is None else str(answer), facts])
    return Table("Criteria for K", ["criterion", "K", "evidence"], rows)


def agreement(record: RunRecord) -> Table | None:
    """Agreement of the clusters with labels that were never trained on."""
    found = (record.results or {}).get("clustering", {}).get("agreement")
    if not found:
        return None
    rows = [[label, *(f"{v[name]:.3f}" for name in ("ari", "nmi", "purity"))] for label, v in found.items()]
    return Table("Clusters against labels", ["label", "adjusted Rand", "mutual information", "purity"], rows)


def router_sentences(record: RunRecord) -> list[str]:
    """What the router's numbers mean."""
    router = (record.results or {}).get("router")
    if not router or record.n_clusters < 2:
        return []
    return [
        f"The router, which sees the prompt only, agrees with a prompt's own gradient on "
        f"{100 * router['accuracy']:.1f} % of the prompts; its calibration error is "
        f"{100 * router['calibration_error']:.1f} points.",
        f"Its choice costs {router['regret']:+.4f} nats against the expert of the prompt's own cluster, and "
        f"{router['oracle_gap']:+.4f} against the best expert for every prompt (which is biased low).",
    ]


def accounting(record: RunRecord) -> tuple[list[str], list[Table]] | None:
    """Warnings and sentences, and the rows of every file, of every split, and of every reason to drop one."""
    found = record.accounting
    if found is None:
        return None
    files = [
        [visible(f["source"], 40), f["split"], f"{f['rows']:,}", f"{f['kept']:,}", f"{f['rows'] - f['kept']:,}",
         _losses(f["lost"]), f"{f['truncated']['count']:,}"] for f in found["files"]
    ]  # fmt: skip
    splits = [
        [name, f"{n:,}", f"{tokens['tokens']:,}", f"{tokens['supervised']:,}", f"{tokens['longest']:,}"]
        for name, n in found["splits"].items()
        if (tokens := found["tokens"].get(name)) is not None
    ]
    near = found["near_duplicates"]
    sentences = [
        *(f"Warning: {visible(w, 400)}." for w in found["warnings"]),
        f"{near['rows']:,} rows in {near['groups']:,} groups of near-duplicate prompts were kept within one split; "
        f"{found['leaks']['exact_prompts']:,} test rows have the exact prompt of a training row.",
    ]
    head = ["source", "side", "rows", "kept", "lost", "why", "cut to length"]
    return sentences, [
        Table("Rows of every file", head, files),
        Table("Rows and tokens of every split", ["split", "rows", "tokens", "with loss", "longest"], splits),
    ]


def _losses(lost: dict[str, Any]) -> str:
    return "; ".join(f"{entry['count']:,} {REASONS.get(reason, reason)}" for reason, entry in lost.items()) or "none"


def costs(record: RunRecord) -> Table | None:
    """Seconds and peak memory of every stage."""
    if not record.costs:
        return None
    rows = [[visible(s, 60), f"{c['seconds']:.1f}", f"{c['peak_memory_bytes'] / 2**20:,.0f}"]
            for s, c in record.costs.items()]  # fmt: skip
    return Table("Cost of every stage", ["stage", "seconds", "peak memory, MB"], rows)


def training_cost(record: RunRecord) -> Table | None:
    """Steps, tokens and parameters of every method, and forward passes a token when it answers."""
    if record.results is None:
        return None
    names = ("steps", "tokens", "parameters", "passes_per_token")
    rows = [[name, *(f"{m[key]:,}" if key in m else "" for key in names)]
            for name, m in record.results["methods"].items()]  # fmt: skip
    return Table("Cost of every method", ["method", *(n.replace("_", " ") for n in names)], rows)


def replay(record: RunRecord) -> tuple[str, str, list[list[str]], dict[str, str]]:
    """Config text, digest of the config, stage hashes, versions."""
    config = visible((record.run.path / "config.yaml").read_text(encoding="utf-8"), 20_000)
    stages = [[stage, digest(entry["files"])[:16]] for stage, entry in record.manifest["stages"].items()]
    return config, str(record.manifest["config"])[:16], stages, record.versions or {}


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
