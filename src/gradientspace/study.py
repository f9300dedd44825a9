"""Several configs, several seeds, every method of each on one table with means, intervals and costs.

A claim ("clear") needs: the paired interval of the loss excludes zero, every seed has the same sign, and the mean over
tokens and its average over domains have that sign too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace.bootstrap import Resampled, Statistic, resample
from gradientspace.config import GradientSpaceConfig, InferenceMode, load_config
from gradientspace.errors import InputError
from gradientspace.files import read_json
from gradientspace.progress import say
from gradientspace.run_folder import Run

SCHEMA = 1
OURS = "gradientspace"
_MODES = get_args(InferenceMode)
_DESCRIPTIONS = ("clustering", "groupings", "router", "variance", "budget")
_LOSSES = ("loss", "token_loss", "domain_mean_token_loss")
# The costs of these are what the gradient pass costs, too.
_USES_CLUSTERING = (OURS, *_MODES, "plain", "less", "projection-512", "projection-2048", "gradientspace-paper")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One config with its finished runs, one a seed."""

    name: str
    runs: list[Run]


def run_all(
    sources: Sequence[str], *, seeds: int | None, split: str | None, overrides: Sequence[str] = ()
) -> list[Entry]:
    """Run every config with every seed, stages in common made once; run folders are taken as they are.

    With `seeds` or `split`, the run folders are NAME-seedS, NAME-dev_b-seedS. Run folders that differ in their seed
    only are one entry. `overrides` are command-line words for every config. Raises `InputError` for a run folder where
    any of them ask for another.
    """

    configs: list[GradientSpaceConfig] = []
    finished: list[Run] = []
    for source in sources:
        if Path(source).is_dir():
            if seeds or split or overrides:
                raise InputError(f"{source} is a finished run: --seeds, --split and options need configs")
            finished.append(Run.open(source))
        else:
            configs.append(load_config(source, overrides))
    return entries([*finished, *run_configs(configs, seeds=seeds, split=split, lenders=finished)])


def run_configs(
    configs: Sequence[GradientSpaceConfig], *, seeds: int | None, split: str | None, lenders: Sequence[Run] = ()
) -> list[Run]:
    """Every config with every seed, all configs with the first seed first. Raises what `pipeline.run` raises."""
    from gradientspace.pipeline import run

    asked = [_with(config.validate(), i, seeds, split) for i in range(seeds or 1) for config in configs]
    lenders = [*lenders, *_earlier(asked)]
    runs: list[Run] = []
    for config in asked:
        say(f"== {config.name}")
        runs.append(run(config, lenders=[*lenders, *runs]))
    return runs


def _with(config: GradientSpaceConfig, i: int, seeds: int | None, split: str | None) -> GradientSpaceConfig:
    if not seeds and not split:
        return config
    seed, name = config.seed + i, config.name
    name = f"{name}{f'-{split}' if split else ''}-seed{seed}"
    evaluation = dataclasses.replace(config.evaluation, split=split or config.evaluation.split)
    return dataclasses.replace(config, seed=seed, name=name, evaluation=evaluation)


def _earlier(asked: Sequence[GradientSpaceConfig]) -> list[Run]:
    """Other runs beside those asked for, from which stages may be taken; those of another version are left out."""
    new = {config.run_folder for config in asked}
    found = []
    for folder in sorted({f.parent for c in asked for f in Path(c.output_dir).glob("*/config.yaml")} - new):
        with contextlib.suppress(InputError):
            run = Run.open(folder)
            run.manifest()
            found.append(run)
    return found


def entries(runs: Sequence[Run]) -> list[Entry]:
    """Runs that differ in name and seed only are one entry, by the name they share."""
    grouped: dict[str, list[Run]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        values = {k: v for k, v in run.config.to_dict().items() if k not in ("name", "output_dir", "seed")}
        grouped.setdefault(repr(values), []).append(run)
    result = []
    for members in grouped.values():
        name = members[0].path.resolve().name
        result.append(Entry(re.sub(r"-seed\d+$", "", name) if len(members) > 1 else name, members))
    return result


# ------------------------------------------------------------------------ the table


def table(found: Sequence[Entry], *, against: str = "single") -> dict[str, Any]:
    """The results contract over seeds: every number is `{"mean", "low", "high"}`.

    For what is measured sample by sample, `low` and `high` are the 95 % interval of a paired bootstrap over samples
    whose values are averaged over seeds; for what a run has one number of, the smallest and largest of its seeds.
    With several entries a method is called ENTRY/METHOD, and one that is the same in another entry is shown once.
    """
    measured = _Measured(found)
    _known(measured, against)
    results = [[read_json(run.path / "evaluation/results.json") for run in entry.runs] for entry in found]
    lead = measured.key(0, against)
    methods = {}
    for e, entry in enumerate(found):
        for method in measured.methods[e]:
            key = measured.key(e, method)
            if key in measured.columns:
                methods[key] = {**measured.summary(key), **_costs(entry, method, results[e])}
                if key != lead:
                    methods[key]["difference"] = measured.difference(key, lead)
    return {
        "schema": SCHEMA,
        "run": found[0].name if len(found) == 1 else [entry.name for entry in found],
        "seeds": [run.config.seed for run in found[0].runs],
        "split": results[0][0]["split"],
        "against": lead,
        "domains": measured.resampled.strata,
        "methods": methods,
        "comparisons": {f"{a} - {b}": measured.difference(a, b) for a, b in _pairs(measured, found)},
        **{name: _by_entry(found, results, name) for name in _DESCRIPTIONS},
    }


class _Measured:
    """Losses, and where generated matches, of every method, as columns that are resampled together."""

    def __init__(self, found: Sequence[Entry]) -> None:
        self.found = found
        self.tables = [[_read_samples(run) for run in entry.runs] for entry in found]
        self.ids = [table["id"].to_pylist() for table in self.tables[0]]
        for entry, tables in zip(found, self.tables, strict=True):
            if [t["id"].to_pylist() for t in tables] != self.ids:
                raise InputError(
                    f"{entry.name} was evaluated on other samples than {found[0].name}: "
                    "use the same data, split and seeds for all"
                )
        self.methods = [_methods(tables[0]) for tables in self.tables]
        position = {id: i for i, id in enumerate(dict.fromkeys(id for ids in self.ids for id in ids))}
        self.rows = [np.array([position[id] for id in ids]) for ids in self.ids]
        strata = [""] * len(position)
        for table, rows in zip(self.tables[0], self.rows, strict=True):
            for i, label in zip(rows, _strata(table), strict=True):
                strata[i] = label
        self.strata = strata
        self.columns: dict[str, list[np.ndarray]] = {}
        """Method -> losses of each seed."""
        self.exact: dict[str, list[np.ndarray]] = {}
        self._collect()
        self.resampled, self.number = self._resample(len(position))

    def key(self, entry: int, method: str) -> str:
        return method if len(self.found) == 1 else f"{self.found[entry].name}/{method}"

    def _collect(self) -> None:
        for e, tables in enumerate(self.tables):
            for method in self.methods[e]:
                losses = [t[f"loss:{method}"].to_numpy() for t in tables]
                # `base` and `single` of a second config are often the very same.
                if any(_same(losses, self.columns.get(self.key(d, method))) for d in range(e)):
                    continue
                self.columns[self.key(e, method)] = losses
                if f"exact_match:{method}" in tables[0].column_names:
                    self.exact[self.key(e, method)] = [t[f"exact_match:{method}"].to_numpy() for t in tables]

    def _resample(self, n: int) -> tuple[Resampled, dict[str, int]]:
        """A sample's value is its sum over the seeds that have it, beside how many do: dev_b differs by seed."""
        tokens = [t["tokens"].to_numpy() for t in self.tables[0]]
        columns = {"count": [np.ones(len(rows)) for rows in self.rows], "tokens": tokens}
        for key, losses in self.columns.items():
            columns[f"loss:{key}"] = losses
            columns[f"token_loss:{key}"] = [v * t for v, t in zip(losses, tokens, strict=True)]
        columns |= {f"exact_match:{key}": values for key, values in self.exact.items()}
        matrix = np.zeros((n, len(columns)))
        for j, values in enumerate(columns.values()):
            for rows, value in zip(self.rows, values, strict=True):
                matrix[rows, j] += value
        return resample(matrix, self.strata), {name: j for j, name in enumerate(columns)}

    def statistic(self, metric: str, key: str, minus: str | None = None, over: int | None = None) -> Statistic:
        column = "loss" if metric == "loss" else metric.removeprefix("domain_mean_")
        below = "tokens" if column == "token_loss" else "count"
        return Statistic(
            self.number[f"{column}:{key}"],
            self.number[below],
            minus=None if minus is None else self.number[f"{column}:{minus}"],
            over=over,
            mean_of_strata=metric.startswith("domain_mean_"),
        )

    def metrics(self, *keys: str) -> tuple[str, ...]:
        return (*_LOSSES, "exact_match") if all(key in self.exact for key in keys) else _LOSSES

    def summary(self, key: str) -> dict[str, Any]:
        interval = self.resampled.interval
        n = [int((np.asarray(self.strata) == s).sum()) for s in self.resampled.strata]
        parts = [m for m in self.metrics(key) if m != "domain_mean_token_loss"]
        by_domain = {
            domain: {m: interval(self.statistic(m, key, over=s)) for m in parts} | {"n": n[s]}
            for s, domain in enumerate(self.resampled.strata)
        }
        overall = {m: interval(self.statistic(m, key)) for m in self.metrics(key)} | {"n": sum(n)}
        return {"overall": overall, "by_domain": by_domain}

    def difference(self, a: str, b: str) -> dict[str, Any]:
        """Paired differences a - b with intervals, each seed's mean difference, and whether a claim may be made."""
        result: dict[str, Any] = {m: self.resampled.interval(self.statistic(m, a, minus=b)) for m in self.metrics(a, b)}
        for metric, values in (("loss", self.columns), ("exact_match", self.exact)):
            if a in values and b in values:
                pairs = zip(values[a], values[b], strict=True)
                result[metric]["by_seed"] = [float((x - y).mean()) for x, y in pairs]
        signs = {np.sign(v) for v in (*(result[m]["mean"] for m in _LOSSES), *result["loss"]["by_seed"])}
        loss = result["loss"]
        result["clear"] = bool(loss["low"] * loss["high"] > 0 and len(signs) == 1)
        result["by_domain"] = {
            domain: self.resampled.interval(self.statistic("loss", a, minus=b, over=s))
            for s, domain in enumerate(self.resampled.strata)
        }
        return result


def _methods(table: pa.Table) -> list[str]:
    return [c.removeprefix("loss:") for c in table.column_names if c.startswith("loss:")]


def _same(losses: Sequence[np.ndarray], others: Sequence[np.ndarray] | None) -> bool:
    return others is not None and all(np.array_equal(a, b) for a, b in zip(losses, others, strict=True))


def _known(measured: _Measured, against: str) -> None:
    if against not in measured.methods[0]:
        name = measured.found[0].name
        raise InputError(f"{name} has no method {against!r}; it has {', '.join(measured.methods[0])}")


def _strata(table: pa.Table) -> list[str]:
    pairs = zip(table["domain"].to_pylist(), table["source"].to_pylist(), strict=True)
    return [domain or source or "all" for domain, source in pairs]


def _read_samples(run: Run) -> pa.Table:
    return pq.read_table(run.require("evaluation", f"eval {run.path}") / "samples.parquet")


def _pairs(measured: _Measured, found: Sequence[Entry]) -> list[tuple[str, str]]:
    """Ours against every other method of its config, every baseline against single, and ours across configs."""
    pairs = []
    for e in range(len(found)):
        ours, single = measured.key(e, OURS), measured.key(e, "single")
        for method in measured.methods[e]:
            key = measured.key(e, method)
            if method in _MODES:
                pairs.append((key, ours))
            elif method != OURS:
                pairs.append((ours, key))
                if method != "single":
                    pairs.append((key, single))
    pairs += [(measured.key(b, OURS), measured.key(a, OURS)) for a, b in combinations(range(len(found)), 2)]
    return [(a, b) for a, b in pairs if a in measured.columns and b in measured.columns]


def _costs(entry: Entry, method: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Steps, tokens, parameters and passes of the method, and seconds and peak memory of the stages it needs."""
    written = ("steps", "tokens", "parameters", "passes_per_token")
    costs = {name: spread([r["methods"][method][name] for r in results]) for name in written}
    stages = [[run.costs()[s] for s in _stages_of(method, run)] for run in entry.runs]
    if all(run and all("seconds" in s for s in run) for run in stages):
        costs["seconds"] = spread([sum(s["seconds"] for s in run) for run in stages])
        costs["peak_memory_bytes"] = spread([max(s["peak_memory_bytes"] for s in run) for run in stages])
    return costs


def _stages_of(method: str, run: Run) -> list[str]:
    """The stages that have to be made for this method alone."""
    if method == "base":
        return []
    if method == "single":
        own: tuple[str, ...] = ("single",)
    elif method == OURS or method in _MODES:
        own = ("router", "experts/")
    else:
        own = (f"baselines/{method}/",)
    needed = ("warmup", *own)
    if method in _USES_CLUSTERING:
        needed += ("clustering",)
    if method != "gradientspace-paper":
        needed += ("shared",)
    return [s for s in run.costs() if s.startswith(needed)]


def _by_entry(found: Sequence[Entry], results: Sequence[Sequence[dict[str, Any]]], name: str) -> Any:
    parts = [_spread_all([r[name] for r in of_entry]) for of_entry in results]
    return parts[0] if len(found) == 1 else {e.name: part for e, part in zip(found, parts, strict=True)}


def _spread_all(values: Sequence[Any]) -> Any:
    """The same nested dict with every number replaced by its spread over seeds; lists are kept, one a seed."""
    first = values[0]
    if isinstance(first, dict):
        common = [k for k in first if all(k in v for v in values)]
        return {k: _spread_all([v[k] for v in values]) for k in common}
    if isinstance(first, int | float) and not isinstance(first, bool):
        return spread(values)
    return list(values)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": float(np.mean(values)), "low": float(min(values)), "high": float(max(values))}
