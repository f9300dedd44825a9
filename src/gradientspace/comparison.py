"""Evaluate every method of a run on the same held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace.arm import Arm
from gradientspace.baselines import baseline_arm, grouping_of
from gradientspace.baselines.adapters import one_adapter
from gradientspace.calibration import expected_calibration_error
from gradientspace.config import InferenceMode
from gradientspace.data.sample import IGNORE_INDEX
from gradientspace.ensemble import ensemble_answers, ensemble_losses
from gradientspace.evaluation import agreement, paired_bootstrap, summarise, verdict
from gradientspace.files import write_json
from gradientspace.grouping import Groups, held_out
from gradientspace.inference import BASE, Experts, expert_folders
from gradientspace.job import Job
from gradientspace.models import padding_id
from gradientspace.progress import say
from gradientspace.router import Fallback, Router
from gradientspace.scoring import distinct, score

SCHEMA = 1
MOST_UNEQUAL = 0.01
UNEQUAL = ("single-long",)
"""Arms that are given other budgets on purpose."""


@dataclass
class Outcome:
    """One method on the evaluated samples: losses (n,), and where asked for, answers and 0/1 matches (n,)."""

    losses: np.ndarray
    tokens: np.ndarray
    answers: list[str] | None = None
    exact: np.ndarray | None = None


def evaluate(job: Job, folder: Path) -> None:
    """Stage `evaluation`: `results.json` and, for every sample and method, `samples.parquet`."""
    samples, rows = job.evaluated(), evaluated_rows(job)
    groups = Groups.read(job.run.path / "clustering")
    router = Router.load(job.run.path / "router", job.encoder)
    probabilities = router.predict_proba([s.prompt for s in samples])
    clusters = groups.held_out[rows]

    arms = {
        "base": Arm([], np.full(len(samples), BASE), []),
        "single": one_adapter(job, job.run.path / "single").of(rows),
        **{name: baseline_arm(job, name).of(rows) for name in job.config.evaluation.baselines},
    }
    outcomes = {name: measure(job, arm) for name, arm in arms.items()}
    ensembles = our_ensembles(job, probabilities)
    by_expert, by_ensemble = losses_of_our_experts(job, ensembles)
    unsure = router.falls_back(probabilities)
    ours = our_arms(job, ensembles, probabilities.argmax(axis=1), clusters, by_expert)
    if unsure.any():
        ours["gradientspace"] = with_fallback(job, ours["gradientspace"], unsure, router.fallback)
    for name, arm in ours.items():
        outcomes[name] = measure(job, arm, by_ensemble[name] if arm.ensemble else looked_up(by_expert, arm.choice))
    arms |= ours

    domains = [s.domain or s.source or "all" for s in samples]
    results = {
        "schema": SCHEMA,
        "run": job.config.name,
        "seed": job.config.seed,
        "split": job.config.evaluation.split,
        "domains": sorted(set(domains)),
        "methods": {
            name: {**summarise(o.losses, o.tokens, domains, o.exact), **variety(o, domains), **arms[name].cost()}
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
            name: describe_groups(job, Groups.read(made))
            for name in job.config.evaluation.baselines
            if (made := grouping_of(job, name)) is not None
        },
        "router": describe_router(probabilities, probabilities.argmax(axis=1), clusters, by_expert)
        | {"fallback_rate": float(unsure.mean())},
        "experts": {"loss_by_domain": expert_by_domain(by_expert, domains)},
        "variance": groups.facts.get("variance", {}),
    }
    results["budget"] = token_budget(results["methods"])
    results["verdict"] = verdict(results)
    say(equal_budgets(results["methods"]))
    write_json(folder / "results.json", results)
    write_samples(folder / "samples.parquet", job, clusters, probabilities, outcomes)


def evaluated_rows(job: Job) -> list[int]:
    """Where the evaluated samples stand among the held-out rows."""
    number = {s.id: i for i, s in enumerate(held_out(job.data))}
    return [number[s.id] for s in job.evaluated()]


def our_ensembles(job: Job, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Weights (n, K) of our experts for the ensembles that `evaluation.inference_modes` names."""
    weights = {
        "uniform-ensemble": np.full(probabilities.shape, 1 / probabilities.shape[1]),
        "weighted-ensemble": probabilities,
    }
    return {mode: weights[mode] for mode in job.config.evaluation.inference_modes if mode in weights}


def our_arms(
    job: Job, ensembles: dict[str, np.ndarray], routed: np.ndarray, clusters: np.ndarray, by_expert: np.ndarray
) -> dict[str, Arm]:
    """GradientSpace, and its experts asked in the other ways that `evaluation.inference_modes` names."""
    experts = expert_folders(job.run.path / "experts")
    choices = {
        "oracle": by_expert.argmin(axis=1),
        # A sample without a usable gradient has no nearest centroid: it goes where its prompt is routed.
        "nearest-centroid": np.where(clusters >= 0, clusters, routed),
        **ensembles,
    }
    asked = {"gradientspace": routed, **{mode: choices[mode] for mode in job.config.evaluation.inference_modes}}
    return {name: Arm(experts, choice, [*job.shared_stage, *experts]) for name, choice in asked.items()}


def with_fallback(job: Job, arm: Arm, unsure: np.ndarray, fallback: Fallback) -> Arm:
    """The arm as it is served: the base or the shared adapter answers the rows (n,) that the router is unsure of.

    With the fallback `error` nobody would; such a row is measured with the expert it would have had.
    """
    if fallback == "error":
        return arm
    if fallback == "base":
        return Arm(arm.adapters, np.where(unsure, BASE, arm.choice), arm.trained)
    return Arm([*arm.adapters, *job.shared_stage], np.where(unsure, len(arm.adapters), arm.choice), arm.trained)


def measure(job: Job, arm: Arm, losses: np.ndarray | None = None) -> Outcome:
    """Losses, where they are not known already, and with `evaluation.exact_match` greedy answers, of the samples."""
    samples, options = job.evaluated(), job.config.evaluation
    pad, size = padding_id(job.tokenizer), options.per_device_eval_batch_size
    tokens = np.array([sum(label != IGNORE_INDEX for label in s.labels[1:]) for s in samples])
    with Experts(job.base, arm.adapters) as experts:
        if losses is None and arm.ensemble:
            losses = ensemble_losses(experts, samples, [arm.choice], batch_size=size, pad_token_id=pad)[0][:, 0]
        elif losses is None:
            losses, _ = experts.losses(samples, arm.choice, batch_size=size, pad_token_id=pad)
        answers = answer(job, experts, arm) if options.exact_match else None
    exact = None if answers is None else np.array(score(answers, samples, options.scorers))
    return Outcome(losses, tokens, answers, exact)


def answer(job: Job, experts: Experts, arm: Arm) -> list[str]:
    """Greedy answers to the evaluated samples' prompts."""
    prompts, options = [s.prompt_ids for s in job.evaluated()], job.config.evaluation
    if not arm.ensemble:
        return experts.generate(
            prompts, arm.choice, job.tokenizer, batch_size=options.per_device_eval_batch_size,
            max_new_tokens=options.max_new_tokens, do_sample=False, eos_token_id=job.template.stop_ids,
        )  # fmt: skip
    tokens = ensemble_answers(
        experts, prompts, arm.choice, batch_size=options.per_device_eval_batch_size,
        pad_token_id=padding_id(job.tokenizer), max_new_tokens=options.max_new_tokens, stop_ids=job.template.stop_ids,
    )  # fmt: skip
    return [text.strip() for text in job.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def losses_of_our_experts(job: Job, ensembles: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(n, K): each evaluated sample's loss under each expert, and (n,) under each ensemble of them."""
    with Experts(job.base, expert_folders(job.run.path / "experts")) as experts:
        mixed, by_expert = ensemble_losses(
            experts, job.evaluated(), list(ensembles.values()), alone=True, pad_token_id=padding_id(job.tokenizer),
            batch_size=job.config.evaluation.per_device_eval_batch_size,
        )  # fmt: skip
    return by_expert, dict(zip(ensembles, mixed.T, strict=True))


def looked_up(by_expert: np.ndarray, choice: np.ndarray) -> np.ndarray | None:
    """(n,): losses of one expert a sample, from all of them (n, K); `None` where something else answers a sample."""
    if choice.min() < 0 or choice.max() >= by_expert.shape[1]:
        return None
    return by_expert[np.arange(len(choice)), choice]


def variety(outcome: Outcome, domains: Sequence[str]) -> dict[str, Any]:
    """`distinct`: the share of different word pairs in each domain's answers, where answers were generated."""
    if outcome.answers is None:
        return {}
    pairs = list(zip(outcome.answers, domains, strict=True))
    return {"distinct": {d: distinct([text for text, own in pairs if own == d], 2) for d in sorted(set(domains))}}


def token_budget(methods: dict[str, Any]) -> dict[str, Any]:
    """Do the trained arms see the same tokens? `largest_difference` is relative to the fewest; 1 % is the limit."""
    ways = get_args(InferenceMode)  # of asking experts that are counted already
    tokens = {name: m["tokens"] for name, m in methods.items() if m["tokens"] and name not in (*UNEQUAL, *ways)}
    difference = max(tokens.values()) / min(tokens.values()) - 1
    return {"largest_difference": difference, "equal": difference <= MOST_UNEQUAL, "compared": list(tokens)}


def equal_budgets(methods: dict[str, dict[str, Any]]) -> str:
    """One line that says whether the trained methods saw the same tokens."""
    budget = token_budget(methods)
    costs = {name: methods[name] for name in budget["compared"]}
    arms = "; ".join(f"{name} {cost['steps']:,} steps, {cost['tokens']:,} tokens" for name, cost in costs.items())
    verdict = "the same tokens" if budget["equal"] else "NOT the same tokens: compare with care"
    difference = 100 * budget["largest_difference"]
    return f"  {verdict} for every trained method (largest difference {difference:.2f} %): {arms}"


def comparisons(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Which pairs get an interval: every trained method against `single`, ours against every baseline."""
    modes = [m for m in methods if m in get_args(InferenceMode)]
    others = [m for m in methods if m not in ("base", "single", "gradientspace", *modes)]
    return [
        ("gradientspace", "single"),
        *((m, "single") for m in others),
        *(("gradientspace", m) for m in others),
        *((m, "gradientspace") for m in modes),
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
    domains = np.array([s.domain or s.source or "all" for s in job.data.fit])
    return {
        "n_clusters": groups.n_clusters,
        "sizes": groups.sizes,
        "sizes_by_domain": {
            str(d): np.bincount(groups.fit[(domains == d) & (groups.fit >= 0)], minlength=groups.n_clusters).tolist()
            for d in np.unique(domains)
        },
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
