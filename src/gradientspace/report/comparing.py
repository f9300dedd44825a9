"""Several runs side by side on one offline page. Every number comes from the runs' own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradientspace.evaluation import paired_bootstrap
from gradientspace.files import write_text
from gradientspace.plain_text import visible
from gradientspace.report.charts import Chart
from gradientspace.report.clusters import cluster_titles
from gradientspace.report.figures import intervals, short
from gradientspace.report.page import fill
from gradientspace.report.record import RunRecord
from gradientspace.report.sections import Table, verdict
from gradientspace.run_folder import Run


def write_comparison(runs: Sequence[Run], path: Path) -> Path:
    """Write the page that lays `runs` side by side to `path`; returns it."""
    records = [RunRecord.read(run) for run in runs]
    names = _names(records)
    values = {
        "page_title": " beside ".join(names),
        "names": names,
        "verdicts": [(name, *_verdict(record)) for name, record in zip(names, records, strict=True)],
        "paired": _paired(names, records),
        "facts": _facts(names, records),
        "differences": _differences(names, records),
        "methods": _methods(names, records),
        "clusters": _clusters(names, records),
        "options": _options(names, records),
    }
    write_text(path, fill("compare.html", values))
    return path


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The folders' names; with their parents where two are the same."""
    names = [visible(record.name, 60) for record in records]
    if len(set(names)) < len(names):
        names = [visible("/".join(record.run.path.resolve().parts[-2:]), 120) for record in records]
    return names


def _verdict(record: RunRecord) -> tuple[str, str]:
    headline, sentences = verdict(record)
    return headline, sentences[0]


def _facts(names: Sequence[str], records: Sequence[RunRecord]) -> Table:
    columns = [_facts_of(record) for record in records]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    return Table("What each run has; an empty cell is something it does not have", ["fact", *names], rows)


def _facts_of(record: RunRecord) -> dict[str, str]:
    facts: dict[str, str] = {}
    if record.results is not None:
        difference = record.results["comparisons"]["gradientspace - single"]
        facts["evaluated on"] = f"{record.results['methods']['base']['overall']['n']:,} of {record.results['split']}"
        facts["routed minus one LoRA, nats"] = _interval(difference["loss"])
        if "exact_match" in difference:
            facts["exact match, points"] = _interval({k: 100 * v for k, v in difference["exact_match"].items()}, 1)
        facts["router agrees with the gradient"] = f"{100 * record.results['router']['accuracy']:.1f} %"
        facts["regret, nats"] = f"{record.results['router']['regret']:+.4f}"
    if record.clustering is not None:
        facts["clusters"] = str(record.n_clusters)
        facts["sizes"] = ", ".join(str(n) for n in record.clustering["sizes"])
        if (stability := record.clustering.get("stability")) is not None:
            facts["stability (adjusted Rand)"] = f"{stability['mean']:.2f}"
    if record.accounting is not None:
        facts["training rows"] = f"{record.accounting['splits']['fit']:,}"
    if record.costs:
        facts["seconds"] = f"{sum(c['seconds'] for c in record.costs.values()):.0f}"
        facts["peak memory, MB"] = f"{max(c['peak_memory_bytes'] for c in record.costs.values()) / 2**20:,.0f}"
    return facts


def _interval(value: dict[str, float], digits: int = 4) -> str:
    return f"{value['mean']:+.{digits}f} ({value['low']:+.{digits}f} to {value['high']:+.{digits}f})"


def _paired(names: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """Routed loss of every run against the first one's, where both answered the same prompts."""
    first = records[0].samples
    sentences = []
    for name, record in zip(names[1:], records[1:], strict=True):
        if first is None or record.samples is None:
            continue
        if not first["id"].equals(record.samples["id"]):
            sentences.append(f"{name} was evaluated on other prompts than {names[0]}: no paired difference.")
            continue
        loss = [table["loss:gradientspace"].to_numpy() for table in (record.samples, first)]
        strata = [d or s or "" for d, s in zip(first["domain"].to_pylist(), first["source"].to_pylist(), strict=True)]
        difference = paired_bootstrap(loss[0] - loss[1], strata)
        sentences.append(f"On the same prompts, {name} minus {names[0]}: {_interval(difference)} nats of routed loss.")
    return sentences


def _differences(names: Sequence[str], records: Sequence[RunRecord]) -> Chart | None:
    found = [(short(name), record.results["comparisons"]["gradientspace - single"]["loss"])
             for name, record in zip(names, records, strict=True) if record.results is not None]  # fmt: skip
    return intervals("runs", "Routed against one LoRA", found, "routed minus one LoRA, nats")


def _methods(names: Sequence[str], records: Sequence[RunRecord]) -> Table | None:
    columns = [record.results["methods"] if record.results else {} for record in records]
    methods = list(dict.fromkeys(method for column in columns for method in column))
    if not methods:
        return None
    rows = [[m, *(f"{c[m]['overall']['loss']:.4f}" if m in c else "" for c in columns)] for m in methods]
    return Table("Mean loss in nats", ["method", *names], rows)


def _clusters(names: Sequence[str], records: Sequence[RunRecord]) -> list[Table]:
    tables = []
    for name, record in zip(names, records, strict=True):
        if record.clustering is not None and record.assignments is not None:
            titles = cluster_titles(record)
            rows = [[str(k), f"{n:,}", titles[k]] for k, n in enumerate(record.clustering["sizes"])]
            tables.append(Table(f"Clusters of {name}", ["cluster", "samples", "title"], rows))
    return tables


def _options(names: Sequence[str], records: Sequence[RunRecord]) -> Table:
    """Options that are not the same in every run."""
    columns = [dict(_flat(record.run.config.to_dict())) for record in records]
    keys = [k for k in dict.fromkeys(k for c in columns for k in c) if k not in ("name", "output_dir")]
    rows = [[key, *(visible(c.get(key, ""), 200) for c in columns)]
            for key in keys if len({c.get(key) for c in columns}) > 1]  # fmt: skip
    return Table("Options that differ", ["option", *names], rows)


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(values, dict):
        return [pair for k, v in values.items() for pair in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(values, list) and any(isinstance(v, dict) for v in values):
        return [pair for i, v in enumerate(values) for pair in _flat(v, f"{prefix}[{i}]")]
    return [(prefix, str(values))]
