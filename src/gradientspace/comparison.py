"""Evaluate every method of a run on the same held-out samples, and put several runs on one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace.calibration import expected_calibration_error
from gradientspace.errors import InputError
from gradientspace.evaluation import agreement, exact_matches, paired_bootstrap, summarise, verdict
from gradientspace.grouping import Groups, held_out
from gradientspace.inference import BASE, Experts, expert_folders
from gradientspace.job import Job
from gradientspace.models import padding_id
from gradientspace.progress import say
from gradientspace.router import Router
from gradientspace.run_folder import Run, write_json

SCHEMA = 1


@dataclass
class Outcome:
    """One method on the evaluated samples: losses (n,), and where asked for, answers and 0/1 matches (n,)."""

    losses: np.ndarray
    tokens: np.ndarray
    answers: list[str] | None = None
    exact: np.ndarray | None = None


def evaluate(job: Job, folder: Path) -> None:
    """Stage `evaluation`: `results.json` and, for every sample and method, `samples.parquet`."""
    samples = job.evaluated()
    groups = Groups.read(job.run.path / "clustering")
    router = Router.load(job.run.path / "router", job.encoder)
    probabilities = router.predict_proba([s.prompt for s in samples])
    routed = probabilities.argmax(axis=1)
    rows = {s.id: i for i, s in enumerate(held_out(job.data))}
    clusters = groups.held_out[[rows[s.id] for s in samples]]

    n = len(samples)
    outcomes = {
        "base": measure(job, [], np.full(n, BASE)),
        "single": measure(job, [job.run.path / "single"], np.zeros(n, dtype=int)),
    }
    for name in job.config.evaluation.baselines:
        routes = Groups.read(job.run.path / f"baselines/{name}/groups").held_out
        choice = routes[[rows[s.id] for s in samples]]
        outcomes[name] = measure(job, expert_folders(job.run.path / f"baselines/{name}/experts"), choice)
    experts = expert_folders(job.run.path / "experts")
    by_expert = loss_of_every_expert(job, experts)
    best = by_expert.argmin(axis=1)
    outcomes["gradientspace"] = measure(job, experts, routed)
    outcomes["oracle"] = measure(job, experts, best)

    domains = [s.domain or s.source or "all" for s in samples]
    results = {
        "schema": SCHEMA,
        "run": job.config.name,
        "seed": job.config.seed,
        "split": job.config.evaluation.split,
        "domains": sorted(set(domains)),
        "methods": {
            name: {**summarise(o.losses, o.tokens, domains, o.exact), **method_cost(job, name)}
            for name, o in outcomes.items()
        },
        "comparisons": {
            f"{a} - {b}": compare_outcomes(outcomes[a], outcomes[b], domains, job.config.seed)
            for a, b in comparisons(list(outcomes))
        },
        "clustering": {
            **describe_groups(job, groups),
            **{name: fact for name, fact in groups.facts.items() if name != "variance"},
        },
        "groupings": {
            name: describe_groups(job, Groups.read(job.run.path / f"baselines/{name}/groups"))
            for name in job.config.evaluation.baselines
        },
        "router": describe_router(probabilities, routed, clusters, by_expert),
        "experts": {"loss_by_domain": expert_by_domain(by_expert, domains)},
        "variance": groups.facts.get("variance", {}),
    }
    results["verdict"] = verdict(results)
    say(equal_budgets(results["methods"]))
    write_json(folder / "results.json", results)
    write_samples(folder / "samples.parquet", job, clusters, probabilities, outcomes)


def measure(job: Job, folders: Sequence[Path], choice: np.ndarray) -> Outcome:
    """Losses, and with `evaluation.exact_match` greedy answers, of the evaluated samples."""
    samples, options = job.evaluated(), job.config.evaluation
    with Experts(job.base, folders) as experts:
        losses, tokens = experts.losses(
            samples, choice, batch_size=options.per_device_eval_batch_size,
            pad_token_id=padding_id(job.tokenizer),
        )  # fmt: skip
        if not options.exact_match:
            return Outcome(losses, tokens)
        answers = experts.generate(
            [s.prompt_ids for s in samples],
            choice,
            job.tokenizer,
            batch_size=options.per_device_eval_batch_size,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=job.template.stop_ids,
        )
    return Outcome(losses, tokens, answers, exact_matches(answers, [s.reference for s in samples]))


def loss_of_every_expert(job: Job, folders: Sequence[Path]) -> np.ndarray:
    """(n, K): each evaluated sample's loss under each expert, for the oracle and for regret."""
    samples = job.evaluated()
    with Experts(job.base, folders) as experts:
        columns = [
            experts.losses(
                samples, np.full(len(samples), k), pad_token_id=padding_id(job.tokenizer),
                batch_size=job.config.evaluation.per_device_eval_batch_size,
            )[0]
            for k in range(len(folders))
        ]  # fmt: skip
    return np.stack(columns, axis=1)


def method_cost(job: Job, name: str) -> dict[str, Any]:
    """Steps and tokens after the warm-up, adapter parameters and forward passes a token."""
    if name == "base":
        return {"steps": 0, "tokens": 0, "parameters": 0, "passes_per_token": 1}
    if name == "single":
        return job.cost([job.run.path / "single"])
    prefix = "experts" if name in ("gradientspace", "oracle") else f"baselines/{name}/experts"
    cost = job.cost(expert_folders(job.run.path / prefix))
    if name == "oracle":
        cost["passes_per_token"] = len(expert_folders(job.run.path / prefix))
    return cost


def equal_budgets(costs: dict[str, dict[str, Any]]) -> str:
    """One line that says whether the trained methods saw the same tokens: `costs` are those of `method_cost`."""
    trained = {name: cost for name, cost in costs.items() if cost["tokens"] and name != "oracle"}
    tokens = [cost["tokens"] for cost in trained.values()]
    difference = 100 * (max(tokens) / min(tokens) - 1)
    arms = "; ".join(f"{name} {cost['steps']:,} steps, {cost['tokens']:,} tokens" for name, cost in trained.items())
    verdict = "the same tokens" if difference <= 1 else "NOT the same tokens: compare with care"
    return f"  {verdict} for every trained method (largest difference {difference:.2f} %): {arms}"


def comparisons(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Which pairs get an interval: every trained method against `single`, ours against every baseline."""
    others = [m for m in methods if m not in ("base", "single", "gradientspace", "oracle")]
    return [
        ("gradientspace", "single"),
        *((m, "single") for m in others),
        *(("gradientspace", m) for m in others),
        ("oracle", "gradientspace"),
    ]


def compare_outcomes(a: Outcome, b: Outcome, domains: Sequence[str], seed: int) -> dict[str, Any]:
    """Paired differences a - b: `loss` in nats and, where measured, `exact_match`, with 95 % intervals.

    `token_loss` and `domain_mean_token_loss` are the same difference per token, and per token averaged over domains.
    """
    difference = a.losses - b.losses
    labels = np.asarray(domains)
    by_domain = [np.average(difference[labels == d], weights=a.tokens[labels == d]) for d in np.unique(labels)]
    result: dict[str, Any] = {
        "loss": paired_bootstrap(difference, domains, seed=seed),
        "token_loss": float(np.average(difference, weights=a.tokens)),
        "domain_mean_token_loss": float(np.mean(by_domain)),
    }
    if a.exact is not None and b.exact is not None:
        result["exact_match"] = paired_bootstrap(a.exact - b.exact, domains, seed=seed)
    return result


def describe_groups(job: Job, groups: Groups) -> dict[str, Any]:
    """Size of the groups and their agreement with the labels that the data carries (never used to train)."""
    labels = {"domain": [s.domain for s in job.data.fit], "source": [s.source for s in job.data.fit]}
    return {
        "n_clusters": groups.n_clusters,
        "sizes": groups.sizes,
        "agreement": {
            name: agreement(groups.fit, [value or "" for value in values])
            for name, values in labels.items()
            if len(set(values)) > 1
        },
    }


def describe_router(
    probabilities: np.ndarray, routed: np.ndarray, clusters: np.ndarray, by_expert: np.ndarray
) -> dict[str, float]:
    """How often the router agrees with the sample's own gradient, and what its choice costs.

    `regret` is the routed expert's loss minus that of the expert of the sample's gradient cluster, in nats,
    over samples that have one; `oracle_gap` the same against the expert with the lowest loss.
    """
    rows = np.arange(len(routed))
    known = clusters >= 0
    loss = by_expert[rows, routed]
    own = by_expert[rows[known], clusters[known]]
    return {
        "accuracy": float((routed == clusters)[known].mean()),
        "calibration_error": expected_calibration_error(probabilities[known], clusters[known]),
        "regret": float((loss[known] - own).mean()),
        "oracle_gap": float((loss - by_expert.min(axis=1)).mean()),
        "fallback_rate": 0.0,
    }


def expert_by_domain(by_expert: np.ndarray, domains: Sequence[str]) -> dict[str, list[float]]:
    """Mean loss of every expert on every domain, in nats."""
    labels = np.asarray(domains)
    return {str(d): by_expert[labels == d].mean(axis=0).tolist() for d in sorted(set(domains))}


def write_samples(
    path: Path, job: Job, clusters: np.ndarray, probabilities: np.ndarray, outcomes: dict[str, Outcome]
) -> None:
    """One row an evaluated sample: labels, route, and each method's loss, answer and match."""
    samples = job.evaluated()
    columns: dict[str, Any] = {
        "id": [s.id for s in samples],
        "domain": [s.domain for s in samples],
        "source": [s.source for s in samples],
        "prompt": [s.prompt for s in samples],
        "reference": [s.reference for s in samples],
        "tokens": outcomes["base"].tokens,
        "cluster": clusters,
        "expert": probabilities.argmax(axis=1),
        "probability": probabilities.max(axis=1),
    }
    for name, outcome in outcomes.items():
        columns[f"loss:{name}"] = outcome.losses
        if outcome.exact is not None:
            columns[f"exact_match:{name}"] = outcome.exact
            columns[f"answer:{name}"] = outcome.answers
    pq.write_table(pa.table(columns), path)


# ------------------------------------------------------------------- several runs


def compare(runs: Sequence[Run], *, against: str = "single") -> dict[str, Any]:
    """Every method of every run beside each other, with paired differences from one of them.

    Methods are named `RUN/METHOD` where there is more than one run. `against` is a method of the first run.
    All runs must have been evaluated on the same samples. Raises `InputError` otherwise.
    """
    tables = {run.path.name: _read_samples(run) for run in runs}
    leader, first = next(iter(tables.items()))
    for name, table in tables.items():
        if table["id"].to_pylist() != first["id"].to_pylist():
            raise InputError(f"{name} was evaluated on other samples than {leader}: use the same data and seed")
    if f"loss:{against}" not in first.column_names:
        raise InputError(f"{leader} has no method {against!r}; it has {', '.join(_methods(first))}")
    pairs = zip(first["domain"].to_pylist(), first["source"].to_pylist(), strict=True)
    strata = [domain or source or "all" for domain, source in pairs]
    rows = {}
    for name, table in tables.items():
        for method in _methods(table):
            key = f"{name}/{method}" if len(tables) > 1 else method
            rows[key] = _compare_row(table, method, first, against, strata)
    return {"schema": SCHEMA, "against": against, "n": len(strata), "methods": rows}


def _compare_row(table: pa.Table, method: str, first: pa.Table, against: str, strata: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric in ("loss", "exact_match"):
        ours, theirs = f"{metric}:{method}", f"{metric}:{against}"
        if ours in table.column_names and theirs in first.column_names:
            values = table[ours].to_numpy()
            row[metric] = float(values.mean())
            row[f"{metric}_difference"] = paired_bootstrap(values - first[theirs].to_numpy(), strata)
    return row


def _methods(table: pa.Table) -> list[str]:
    return [c.removeprefix("loss:") for c in table.column_names if c.startswith("loss:")]


def _read_samples(run: Run) -> pa.Table:
    return pq.read_table(run.require("evaluation", f"eval {run.path}") / "samples.parquet")
