"""Which router sends a run's prompts to the better expert, and does its probability mean what it says.

    python benchmarks/routers.py RUN [RUN ...] --json benchmarks/results/routers-NAME.json [--fine-tune]

Routers are compared on the first run. Everything is learned on fit and dev_a and judged on dev_b, by the routed
expert's loss minus that of the expert of the sample's own gradient cluster (regret, nats), with 95 % bootstrap
intervals, and by paired differences from the router that the pipeline uses. Targets beside the cluster: the expert with
the lowest loss on dev_a (experts were not trained there), and a soft mix, every expert weighted by how well it does.

The saved router's calibration is shown for every run, say one for each seed, on the split that the run is evaluated
on, and on dev_b with a calibration from dev_a alone, in 10 bins of equal size beside the range in which the calibration
error of a perfectly calibrated router of that size lies in 95 % of draws. The split's prompts are also weighed so that
every source has its share of dev: a router can only be calibrated for prompts like those that it was calibrated on. A
second range is that of a router whose probabilities are true but for temperatures and noise, which it learns from as
many prompts as this one did. Beside it what two simpler calibrations give, learnt from the same prompts: a temperature
for each cluster without noise, and a single temperature.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from gradientspace.assignments import Assignments
from gradientspace.calibration import (
    Calibration,
    fit_calibration,
    fit_temperature,
    negative_log_likelihood,
)
from gradientspace.data import Sample
from gradientspace.errors import RunFolderError
from gradientspace.evaluation import paired_bootstrap
from gradientspace.grouping import Groups, held_out
from gradientspace.inference import Experts, expert_folders
from gradientspace.job import Job
from gradientspace.models import padding_id
from gradientspace.prompts import routing_text
from gradientspace.recluster import coordinate_labels
from gradientspace.routable import RoutableMap
from gradientspace.router import LinearHead, RidgeHead, Router
from gradientspace.run_folder import Run

NEIGHBOURS = (5, 15, 50, 150)
SPREADS = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)
NOISE = (None, 0.1, 0.3, 1.0, 3.0)
SOFTNESS = 0.05
"""Nats: an expert that much worse than another weighs 1/e of it in the soft mix."""
AS_DEV = "sources weighed as in dev"


class Case:
    """A run's prompts as embeddings, their clusters, and every expert's loss on dev."""

    def __init__(self, run: Run, quick: bool) -> None:
        self.job = Job(run)
        data, groups = self.job.data, Groups.read(run.path / "clustering")
        few = 40 if quick else None
        self.run, self.n_clusters, n_a = run, groups.n_clusters, len(data.dev_a)
        position = {sample.id: i for i, sample in enumerate(held_out(data))}
        self.fit, self.dev_a, self.dev_b = data.fit, data.dev_a[:few], data.dev_b[:few]
        self.clusters = {"fit": groups.fit, "dev_a": groups.held_out[:n_a][:few]}
        self.clusters["dev_b"] = groups.held_out[[position[sample.id] for sample in self.dev_b]]
        self.embeddings = {name: self.encode(getattr(self, name)) for name in ("fit", "dev_a", "dev_b")}
        self.losses = {name: self.loss_of_experts(getattr(self, name)) for name in ("dev_a", "dev_b")}

    def encode(self, samples: list[Sample]) -> np.ndarray:
        return self.job.encoder.encode([routing_text(sample.prompt) for sample in samples])

    def loss_of_experts(self, samples: list[Sample]) -> np.ndarray:
        """(n, K) mean completion-token cross-entropy."""
        folders = expert_folders(self.run.path / "experts")
        with Experts(self.job.base, folders) as experts:
            columns = [
                experts.losses(samples, np.full(len(samples), k), batch_size=32,
                               pad_token_id=padding_id(self.job.tokenizer))[0]
                for k in range(len(folders))
            ]  # fmt: skip
        return np.stack(columns, axis=1)


# ------------------------------------------------------------------------------- routers
# Each gives the expert of every dev_b prompt, (n,).


def logistic(case: Case) -> np.ndarray:
    kept = case.clusters["fit"] >= 0
    head = LinearHead.fit(case.embeddings["fit"][kept], case.clusters["fit"][kept], case.job.config.seed)
    return head.predict_scores(case.embeddings["dev_b"]).argmax(1)


def ridge(case: Case) -> np.ndarray:
    routable = RoutableMap.load(case.run.path / "clustering/routable")
    head = RidgeHead(routable.coefficients_, routable.centres_)
    return head.predict_scores(case.embeddings["dev_b"]).argmax(1)


def own_cluster(case: Case) -> np.ndarray:
    """Logistic head on the cluster of each fit row's own gradient, not on the group that an expert was trained on."""
    folder = case.run.path / "clustering"
    centres = np.asarray(RoutableMap.load(folder / "routable").centres_)
    labels = coordinate_labels(Assignments.read(folder / "assignments.parquet").coordinates, centres)
    kept = labels >= 0
    head = LinearHead.fit(case.embeddings["fit"][kept], labels[kept], case.job.config.seed)
    return head.predict_scores(case.embeddings["dev_b"]).argmax(1)


def nearest_neighbours(case: Case) -> np.ndarray:
    """Majority of the k nearest prompts, k by accuracy on dev_a."""
    kept = case.clusters["fit"] >= 0
    known = case.clusters["dev_a"] >= 0
    models = [
        KNeighborsClassifier(k).fit(case.embeddings["fit"][kept], case.clusters["fit"][kept])
        for k in NEIGHBOURS
        if k <= kept.sum()
    ]
    right = [(m.predict(case.embeddings["dev_a"]) == case.clusters["dev_a"])[known].mean() for m in models]
    return models[int(np.argmax(right))].predict(case.embeddings["dev_b"])


def best_expert(case: Case) -> np.ndarray:
    """Logistic head on the expert with the lowest loss on dev_a."""
    labels = case.losses["dev_a"].argmin(1)
    if len(set(labels)) == 1:
        return np.full(len(case.dev_b), labels[0])
    return LogisticRegression(C=1.0, max_iter=2000).fit(case.embeddings["dev_a"], labels).predict(
        case.embeddings["dev_b"]
    )  # fmt: skip


def soft_mix(case: Case) -> np.ndarray:
    """Logistic head on dev_a, every prompt once for each expert, weighted by a softmax of minus its loss."""
    losses = case.losses["dev_a"]
    weights = torch.tensor(-losses / SOFTNESS).softmax(1).numpy()
    n, k = losses.shape
    model = LogisticRegression(C=1.0, max_iter=2000)
    model.fit(np.repeat(case.embeddings["dev_a"], k, axis=0), np.tile(np.arange(k), n), weights.ravel())
    return model.predict(case.embeddings["dev_b"])


def ridge_on_losses(case: Case) -> np.ndarray:
    """Ridge from the embedding to every expert's loss relative to the sample's mean, on dev_a; the lowest is taken."""
    from sklearn.linear_model import RidgeCV

    losses = case.losses["dev_a"]
    model = RidgeCV(alphas=np.logspace(-2, 3, 11)).fit(case.embeddings["dev_a"], losses - losses.mean(1, keepdims=True))
    return model.predict(case.embeddings["dev_b"]).argmin(1)


def fine_tuned(case: Case) -> np.ndarray:
    """The encoder and a linear head trained together on fit for one epoch, 64 word pieces a prompt."""
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(case.job.config.seed)
    encoder = SentenceTransformer(str(case.job.encoder.source.folder), device="cpu")
    encoder.max_seq_length = 64
    head = torch.nn.Linear(case.embeddings["fit"].shape[1], case.n_clusters)
    kept = np.flatnonzero(case.clusters["fit"] >= 0)
    texts = [routing_text(case.fit[i].prompt) for i in kept]
    labels = torch.tensor(case.clusters["fit"][kept])
    optimiser = torch.optim.AdamW(
        [{"params": encoder.parameters(), "lr": 5e-5}, {"params": head.parameters(), "lr": 5e-3}]
    )
    order = torch.randperm(len(texts))
    encoder.train()
    for rows in order.split(32):
        embeddings = encoder(encoder.preprocess([texts[i] for i in rows]))["sentence_embedding"]
        loss = torch.nn.functional.cross_entropy(20 * head(torch.nn.functional.normalize(embeddings)), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    encoder.eval()
    with torch.inference_mode():
        embeddings = encoder.encode([routing_text(s.prompt) for s in case.dev_b], convert_to_tensor=True)
        return head(torch.nn.functional.normalize(embeddings)).argmax(1).numpy()


ROUTERS: dict[str, Callable[[Case], np.ndarray]] = {
    "logistic, cluster": logistic,
    "k nearest neighbours, cluster": nearest_neighbours,
    "logistic, best expert on dev_a": best_expert,
    "logistic, soft mix on dev_a": soft_mix,
    "ridge, losses on dev_a": ridge_on_losses,
}
ROUTABLE: dict[str, Callable[[Case], np.ndarray]] = {
    "ridge, nearest centroid": ridge,
    "logistic, own gradient": own_cluster,
}
"""Of clusters of what the prompt predicts only."""


def compare(case: Case, with_fine_tuning: bool) -> dict[str, Any]:
    clusters, losses = case.clusters["dev_b"], case.losses["dev_b"]
    known = clusters >= 0
    rows = np.arange(len(losses))
    strata = [sample.domain or sample.source or "all" for sample in case.dev_b]
    routers = ROUTERS | ({"fine-tuned encoder, cluster": fine_tuned} if with_fine_tuning else {})
    if (case.run.path / "clustering/routable").is_dir():
        routers |= ROUTABLE
    choices = {name: router(case) for name, router in routers.items()}
    choices["own cluster"] = np.where(known, clusters, 0)
    choices["best expert (oracle)"] = losses.argmin(1)
    own = losses[rows, choices["own cluster"]]
    reference = losses[rows, choices["logistic, cluster"]]
    table = {}
    for name, choice in choices.items():
        loss = losses[rows, choice]
        table[name] = {
            "accuracy": float((choice == clusters)[known].mean()),
            "loss": float(loss.mean()),
            "regret": paired_bootstrap((loss - own)[known], [s for s, k in zip(strata, known, strict=True) if k]),
            "minus_logistic": paired_bootstrap(loss - reference, strata),
        }
        regret, minus = table[name]["regret"], table[name]["minus_logistic"]
        print(
            f"{name:32s} right {table[name]['accuracy']:.3f}  loss {loss.mean():.4f}  regret {regret['mean']:+.4f} "
            f"({regret['low']:+.4f} to {regret['high']:+.4f})  minus logistic {minus['mean']:+.4f} "
            f"({minus['low']:+.4f} to {minus['high']:+.4f})",
            flush=True,
        )
    return table


# --------------------------------------------------------------------------- calibration


class RunRouter:
    """A run's router with prompts whose cluster is known."""

    def __init__(self, run: Run) -> None:
        self.run, self.job = run, Job(run)
        self.router = Router.load(run.path / "router", encoder=self.job.encoder)
        self.clusters = Groups.read(run.path / "clustering").held_out
        self.position = {sample.id: i for i, sample in enumerate(held_out(self.job.data))}
        self.dev_a, self.dev_b = self.seen(self.job.data.dev_a), self.seen(self.job.data.dev_b)

    def seen(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Scores (m, K) and clusters (m,) of the samples whose gradient has a cluster."""
        clusters = self.known(samples)
        embeddings = self.job.encoder.encode([routing_text(sample.prompt) for sample in samples])
        return self.router.head_.predict_scores(embeddings)[clusters >= 0], clusters[clusters >= 0]

    def known(self, samples: Sequence[Sample]) -> np.ndarray:
        """Cluster of every sample (n,), -1 where its gradient has none."""
        return self.clusters[[self.position[sample.id] for sample in samples]]

    def dev_weights(self, samples: Sequence[Sample]) -> np.ndarray:
        """(m,) a source's share of dev over its share of the samples whose gradient has a cluster."""
        dev = Counter(sample.source for sample in [*self.job.data.dev_a, *self.job.data.dev_b])
        sources = [s.source for s, cluster in zip(samples, self.known(samples), strict=True) if cluster >= 0]
        here = Counter(sources)
        return np.array([dev[source] / dev.total() * len(sources) / here[source] for source in sources])

    def calibrations(self) -> list[dict[str, Any]]:
        """Of one half of dev on the other, and of the saved router on the split of the run's evaluation."""
        samples, split = self.job.evaluated(), self.run.config.evaluation.split
        taught, seen = self.seen(self.job.calibrated_on()), self.seen(samples)
        if len(taught[0]) != (n := self.router.n_calibration_):
            raise RunFolderError(f"{self.run.path}: its router learnt from {n} prompts, not {len(taught[0])}: redo it")
        half, saved = fit_calibration(*self.dev_a), self.router.calibration_
        rows = []
        for name, teach, found, known, weights in (
            ("dev_b", self.dev_a, half, self.dev_b, None),
            (split, taught, saved, seen, None),
            (f"{split}, {AS_DEV}", taught, saved, seen, self.dev_weights(samples)),
        ):
            no_noise = np.zeros_like(found.noise)
            simpler = {
                "temperatures": fit_calibration(*teach, noise_spread=None),
                "one_temperature": Calibration(no_noise + fit_temperature(*teach), no_noise),
            }
            row = {"run": self.run.path.name, "split": name, **calibration(*known, found, weights)}
            row["learnt"] = learnt(teach[0], known[0], found, weights, (row["perfect_low"], row["perfect_high"]))
            row |= {way: calibration(*known, other, weights) for way, other in simpler.items()}
            rows.append(row)
            for way, shown in (("as it is", row), *((way, row[way]) for way in simpler)):
                print(
                    f"{row['run']}, {name}, {way}: -log p {shown['negative_log_likelihood']:.4f}, calibration error "
                    f"{shown['calibration_error']:.4f}; a perfect router of {shown['n']} prompts: "
                    f"{shown['perfect_low']:.4f} to {shown['perfect_high']:.4f}",
                    flush=True,
                )
            print(
                f"  where its calibration is learnt from {row['learnt']['n']} prompts: {row['learnt']['low']:.4f} to "
                f"{row['learnt']['high']:.4f}, {row['learnt']['as_perfect']:.0%} of draws like a perfect router",
                flush=True,
            )
        return rows


def likelihood(routers: Sequence[RunRouter], **options: Any) -> float:
    """Mean negative log-likelihood of one half of dev where `fit_calibration(..., **options)` saw the other."""
    values = [
        negative_log_likelihood(fit_calibration(*teach, **options).probabilities(scores), clusters)
        for router in routers
        for teach, (scores, clusters) in ((router.dev_a, router.dev_b), (router.dev_b, router.dev_a))
    ]
    print(f"one half of dev by the other, {options}: -log p {np.mean(values):.4f}", flush=True)
    return float(np.mean(values))


def calibration(
    scores: np.ndarray,
    clusters: np.ndarray,
    how: Calibration,
    weights: np.ndarray | None = None,
    draws: int = 2000,
) -> dict[str, Any]:
    """Likelihood, ten bins of equal weight, their error, and a perfect router's. `scores`: (n, K), the others (n,)."""
    probabilities = how.probabilities(scores)
    right, confidence = probabilities.argmax(1) == clusters, probabilities.max(1)
    w = shares(len(right), weights)
    generator = np.random.default_rng(0)
    null = [binned(confidence, generator.random(len(w)) < confidence, w)[0] for _ in range(draws)]
    low, high = np.quantile(null, [0.025, 0.975])
    error, bins = binned(confidence, right, w)
    return {
        "n": len(clusters),
        "accuracy": float(w @ right),
        "confidence": float(w @ confidence),
        "negative_log_likelihood": float(-w @ np.log(probabilities[np.arange(len(clusters)), clusters])),
        "calibration_error": error,
        "perfect_low": float(low),
        "perfect_high": float(high),
        "bins": bins,
    }


def shares(n: int, weights: np.ndarray | None) -> np.ndarray:
    """(n,) weights that sum to 1, equal ones for `None`."""
    return np.full(n, 1 / n) if weights is None else weights / weights.sum()


def binned(confidence: np.ndarray, right: np.ndarray, w: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Mean distance of confidence and accuracy over ten bins of equal weight, and the bins. All (n,), w sums to 1."""
    order = np.argsort(confidence, kind="stable")
    bins = np.minimum((10 * (w[order].cumsum() - w[order] / 2)).astype(int), 9)
    mass, sure, hit = (
        np.bincount(bins, (w * values)[order], minlength=10) for values in (np.ones(len(w)), confidence, right)
    )
    counts = np.bincount(bins, minlength=10)
    return float(abs(hit - sure).sum()), [
        {"confidence": c / m, "accuracy": h / m, "n": int(n)}
        for m, c, h, n in zip(mass.tolist(), sure.tolist(), hit.tolist(), counts, strict=True)
    ]


def learnt(
    taught: np.ndarray,
    scores: np.ndarray,
    true: Calibration,
    weights: np.ndarray | None,
    perfect: tuple[float, float],
    draws: int = 300,
) -> dict[str, float]:
    """The calibration error where only the calibration is not known, but learnt from as many prompts.

    The router's probabilities are taken to be `true`: labels are drawn from them for the scores `taught` (m, K), which
    a calibration is fitted on, and for `scores` (n, K), which it is judged on. `low` and `high` hold 95 % of draws;
    `as_perfect` is the share of them within the range `perfect`.
    """
    generator = np.random.default_rng(0)
    w = shares(len(scores), weights)
    truth = [true.probabilities(values).cumsum(axis=1) for values in (taught, scores)]

    def labels(cumulated: np.ndarray) -> np.ndarray:
        drawn = (generator.random((len(cumulated), 1)) > cumulated).sum(axis=1)
        return np.minimum(drawn, cumulated.shape[1] - 1)

    errors = []
    for _ in range(draws):
        probabilities = fit_calibration(taught, labels(truth[0])).probabilities(scores)
        right = probabilities.argmax(axis=1) == labels(truth[1])
        errors.append(binned(probabilities.max(axis=1), right, w)[0])
    low, high = np.quantile(errors, [0.025, 0.975])
    inside = np.mean([perfect[0] <= error <= perfect[1] for error in errors])
    return {"n": len(taught), "low": float(low), "high": float(high), "as_perfect": float(inside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders with experts and router")
    parser.add_argument("--fine-tune", action="store_true", help="also train the encoder: minutes")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="40 rows of dev, and no fine-tuning")
    options = parser.parse_args()
    runs = [Run.open(path) for path in options.runs]
    case, routers = Case(runs[0], options.quick), [RunRouter(run) for run in runs]
    results = {
        "machine": describe("scikit-learn"),
        "run": runs[0].path.name,
        "split": "dev_b",
        "n": len(case.dev_b),
        "calibration": [row for router in routers for row in router.calibrations()],
        "likelihood_by_spread": {str(spread): likelihood(routers, spread=spread) for spread in SPREADS},
        "likelihood_by_noise_spread": {str(spread): likelihood(routers, noise_spread=spread) for spread in NOISE},
        "routers": compare(case, options.fine_tune and not options.quick),
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
