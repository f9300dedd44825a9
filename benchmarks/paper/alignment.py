"""Held-out routed alignment: what a grouping and its router are worth before an expert is trained, and whether that
ranks groupings as training does.

    python benchmarks/paper/alignment.py examples/real-mix.yaml --seeds 5 --json benchmarks/results/alignment.json
    python benchmarks/paper/alignment.py benchmarks/paper/real-mix.yaml --train 4 8 --json ranking.json

The table: groupings fitted on `fit`, prompts of `dev` routed, alignment of the uncentred unit gradients of `dev` with
the mean of the group each is routed to, first order and for a step of unit length (times 1,000), mean and 95 %
interval over seeds; every seed draws splits, warm-up and clusters anew. Beside them the gain *in loss*: the gradients
of `dev` as long as they are, and a step of unit length along the group's sum with every token counted once, as
training counts them. With `--train`, on the config's own seed, the experts of every grouping are trained too, and the
ranking by alignment is compared with the ranking by `dev` loss. `test` is not read. The inner products of all rows are
kept (N x N), so that any grouping costs no further gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import describe, write_results
from safetensors.numpy import load_file, save_file
from scipy import stats

from gradientspace import pipeline
from gradientspace.baselines.groupings import tfidf_labels
from gradientspace.clustering import OnlineSVDClusterer, spherical_kmeans
from gradientspace.clustering.svd import gradient_svd
from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.data import IGNORE_INDEX
from gradientspace.gradients import PerSampleGradients
from gradientspace.grouping import Groups
from gradientspace.inference import Experts
from gradientspace.job import Job
from gradientspace.models import lora, padding_id
from gradientspace.progress import Progress
from gradientspace.routable import RoutableMap
from gradientspace.router import LinearHead

Grouping = Callable[["Rows", int], tuple[np.ndarray, np.ndarray]]
"""Rows and K -> labels (n_fit,) of `fit` and the groups (n_dev,) that the prompts of `dev` are routed to."""
METRICS = ("first_order", "unit_step", "in_loss")
"""<u_j, m_k>; <u_j, m_k / |m_k|>; <g_j, s_k / |s_k|> with s_k the sum of the group's gradients, each token once."""
BLOCK = 16_384
"""Columns of one product: all rows of a block lie in memory."""
DRAWS = 2000


class Rows:
    """Inner products of all unit gradients of `fit` and `dev` of one run, its prompts' embeddings, and its labels."""

    def __init__(self, job: Job) -> None:
        self.job, self.seed = job, job.config.seed
        self.fit, self.dev = job.data.fit, [*job.data.dev_a, *job.data.dev_b]
        folder = job.run.stage(
            "alignment/rows", lambda f: _write_rows(job, [*self.fit, *self.dev], f), inputs=("warmup",)
        )
        tensors = load_file(str(folder / "rows.safetensors"))
        self.inner, embeddings = tensors["inner"].astype(np.float64), tensors["embeddings"].astype(np.float64)
        n = len(self.fit)
        self.norms, self.tokens = tensors["norms"].astype(np.float64), tensors["tokens"].astype(np.float64)
        self.embeddings, self.dev_embeddings = embeddings[:n], embeddings[n:]
        self.isometry = _isometry(self.inner)[:n]
        position = {id(sample): i for i, sample in enumerate(self.fit)}
        self.validation = [position[id(sample)] for sample in job.data.validation]
        self._clusterers: dict[int, OnlineSVDClusterer] = {}

    def coordinates(self, q: int) -> np.ndarray:
        """(n_fit, q) centred coordinates in the frozen subspace of the validation gradients."""
        if q not in self._clusterers:
            clusterer = OnlineSVDClusterer(2, self.seed, n_components=q)
            self._clusterers[q] = clusterer.initialize(self.isometry[self.validation])
        return np.asarray(self._clusterers[q].transform(self.isometry), dtype=np.float64)

    def in_loss(self, q: int) -> np.ndarray:
        """(n_fit, q) coordinates of the gradients themselves: not centred, not scaled to unit length."""
        basis = gradient_svd(torch.from_numpy(self.isometry[self.validation]), q, center=False).components
        return (self.isometry @ basis.numpy().T).astype(np.float64) * self.norms[: len(self.fit), None]

    def routed(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels without gaps, and where the router that every grouping gets sends `dev`."""
        labels = np.unique(labels, return_inverse=True)[1]
        if labels.max() == 0:
            return labels, np.zeros(len(self.dev), dtype=int)
        head = LinearHead.fit(self.embeddings.astype(np.float32), labels, self.seed)
        return labels, head.predict_scores(self.dev_embeddings.astype(np.float32)).argmax(axis=1)

    def alignment(self, labels: np.ndarray, routed: np.ndarray) -> np.ndarray:
        """(n_dev, 3) of every row of `dev`, as METRICS names them, times 1,000."""
        n = len(labels)
        members = np.equal.outer(labels, np.arange(labels.max() + 1)).astype(float)
        members /= members.sum(axis=0)
        gains, lengths = self._along(members, routed)
        by_token, their_lengths = self._along(members * (self.norms * self.tokens)[:n, None], routed)
        in_loss = self.norms[n:] * by_token / their_lengths
        return 1000 * np.stack([gains, gains / lengths, in_loss], axis=1)

    def _along(self, steps: np.ndarray, routed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row of `dev`: inner product with its group's step, a weighted sum (n_fit, K), and the length."""
        n = len(steps)
        lengths = np.sqrt(np.einsum("ik,ij,jk->k", steps, self.inner[:n, :n], steps, optimize=True))
        return (self.inner[n:, :n] @ steps)[np.arange(len(routed)), routed], lengths[routed]


def _write_rows(job: Job, samples: list[Any], folder: Path) -> None:
    """rows.safetensors: `inner` (n, n) of the unit gradients at the warm-up adapter, `norms` and supervised `tokens`
    (n,), `embeddings` (n, e)."""
    norms = np.zeros(len(samples), dtype=np.float32)
    with (
        tempfile.NamedTemporaryFile(dir=folder) as file,
        lora(job.base, job.config.lora, start=job.run.path / "warmup", seed=job.config.seed) as model,
        PerSampleGradients(model) as engine,
    ):
        units = np.memmap(file.name, dtype=np.float32, mode="w+", shape=(len(samples), engine.dim))
        with Progress("gradients", len(samples), "sample") as progress:
            for batch in engine.stream(samples, max_tokens=job.config.gradients.max_tokens_per_batch):
                norms[batch.indices.numpy()] = batch.norms.cpu().numpy()
                units[batch.indices.numpy()] = (batch.gradients / batch.norms[:, None]).cpu().numpy()
                progress.advance(len(batch.indices))
        inner = torch.zeros(len(samples), len(samples), dtype=torch.float64)
        for start in range(0, engine.dim, BLOCK):
            block = torch.from_numpy(np.array(units[:, start : start + BLOCK]))
            inner += (block @ block.T).double()
        del units
    embeddings = job.encoder.encode([sample.prompt for sample in samples])
    tokens = np.array([sum(label != IGNORE_INDEX for label in sample.labels) for sample in samples], dtype=np.float32)
    tensors = {"inner": inner.float().numpy(), "norms": norms, "tokens": tokens}
    tensors["embeddings"] = np.ascontiguousarray(embeddings, np.float32)
    save_file(tensors, str(folder / "rows.safetensors"))


def _isometry(inner: np.ndarray) -> np.ndarray:
    """(n, r) float32 rows with these inner products: D numbers a row become at most n."""
    values, vectors = np.linalg.eigh(inner)
    kept = values > 1e-7 * values[-1]
    return (vectors[:, kept] * np.sqrt(values[kept])).astype(np.float32)


def _random(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rows.seed)
    return generator.permutation(np.arange(len(rows.fit)) % k), generator.integers(0, k, len(rows.dev))


def _embedding(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    return rows.routed(np.asarray(spherical_kmeans(rows.embeddings, k, 10, rows.seed)[0]))


def _tfidf(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    return rows.routed(tfidf_labels([sample.prompt for sample in rows.fit], k, rows.seed))


def _online(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's online pass: labels as they were given in the stream."""
    clusterer = OnlineSVDClusterer(k, rows.seed).initialize(rows.isometry[rows.validation])
    order = np.random.default_rng(rows.seed).permutation(len(rows.fit))
    labels = np.zeros(len(order), dtype=int)
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        labels[batch] = np.asarray(clusterer.partial_fit(rows.isometry[batch]).assignment_.labels)
    return rows.routed(labels)


def _plain(q: int) -> Grouping:
    def group(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
        return rows.routed(np.asarray(spherical_kmeans(rows.coordinates(q), k, 10, rows.seed)[0]))

    return group


def _routable(q: int, alpha: float | Literal["auto"]) -> Grouping:
    def group(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = RoutableMap(k, alpha=alpha, random_state=rows.seed).fit(rows.embeddings, rows.coordinates(q))
        return rows.routed(np.asarray(found.labels_))

    return group


def _as_routed(grouping: Grouping) -> Grouping:
    """The same groups, but every row of `fit` goes where the router sends its prompt, as a new prompt would."""

    def group(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
        labels, _ = grouping(rows, k)
        head = LinearHead.fit(rows.embeddings.astype(np.float32), np.unique(labels, return_inverse=True)[1], rows.seed)
        return rows.routed(head.predict_scores(rows.embeddings.astype(np.float32)).argmax(axis=1))

    return group


def _routable_in_loss(q: int) -> Grouping:
    def group(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = RoutableMap(k, alpha=1.0, random_state=rows.seed).fit(rows.embeddings, rows.in_loss(q))
        return rows.routed(np.asarray(found.labels_))

    return group


GROUPINGS: dict[str, Grouping] = {
    "random": _random,
    "embedding": _embedding,
    "tfidf": _tfidf,
    "online": _online,
    "plain q=64": _plain(64),
    "plain q=511": _plain(511),
    "routable q=64": _routable(64, 1.0),
    "routable q=64, alpha=10": _routable(64, 10.0),
    "routable q=511": _routable(511, 1.0),
    "routable q=511, alpha=auto": _routable(511, "auto"),
    "routable q=511, as routed": _as_routed(_routable(511, 1.0)),
    "routable in loss q=511": _routable_in_loss(511),
}
TRAINED = [name for name in GROUPINGS if name not in ("routable q=64, alpha=10", "routable q=511, as routed")]
"""Without two that are nearly others."""


def table(rows_of: list[Rows], ks: list[int]) -> list[dict[str, Any]]:
    """One row a grouping and K: mean and 95 % t-interval over seeds of both alignments."""
    found = []
    for k in ks:
        domain = {"domain": _domain} if k == len({sample.domain for sample in rows_of[0].fit}) else {}
        for name, grouping in ({"single": _single} if k == 1 else domain | GROUPINGS).items():
            means = np.array([rows.alignment(*grouping(rows, k)).mean(axis=0) for rows in rows_of])
            row: dict[str, Any] = {"k": k, "grouping": name}
            row |= {metric: interval(means[:, m]) for m, metric in enumerate(METRICS)}
            print(f"K {k:<3} {name:<26}" + "   ".join(f"{m} {_text(row[m])}" for m in METRICS), flush=True)
            found.append(row)
    return found


def _single(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(rows.fit), dtype=int), np.zeros(len(rows.dev), dtype=int)


def _domain(rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The true domain of every row and prompt."""
    names = {name: i for i, name in enumerate(sorted({sample.domain or "" for sample in rows.fit}))}
    return tuple(np.array([names[s.domain or ""] for s in part]) for part in (rows.fit, rows.dev))  # type: ignore


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % t-interval of one value a seed; no interval from one seed."""
    mean = float(values.mean())
    if len(values) == 1:
        return {"mean": mean}
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _text(value: dict[str, float]) -> str:
    around = f" ({value['low']:.1f} to {value['high']:.1f})" if "low" in value else ""
    return f"{value['mean']:6.1f}{around}"


def trained(rows: Rows, ks: list[int], names: list[str]) -> dict[str, Any]:
    """Alignment against `dev` loss after training of these groupings: at each K, and over all."""
    measured = []
    for k in ks:
        for name in names:
            labels, routed = GROUPINGS[name](rows, k)
            losses = dev_losses(rows, f"{name} k={k}", labels, routed)
            gains = rows.alignment(labels, routed)
            measured.append({"k": k, "grouping": name, "gains": gains, "losses": losses})
            means = "   ".join(f"{m} {v:.4g}" for m, v in zip(METRICS, gains.mean(axis=0), strict=True))
            print(f"K {k:<3} {name:<26}loss {losses.mean():.4f}   {means}", flush=True)
    ranking = {f"K={k}": spearman([m for m in measured if m["k"] == k]) for k in ks}
    return {
        "arms": [
            {"k": m["k"], "grouping": m["grouping"], "dev_loss": float(m["losses"].mean())}
            | dict(zip(METRICS, m["gains"].mean(axis=0).tolist(), strict=True))
            for m in measured
        ],
        "spearman": ranking | {"all K": spearman(measured)},
    }


def dev_losses(rows: Rows, name: str, labels: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """(n_dev,) losses of the routed experts, each trained on its group from the shared adapter."""
    job = rows.job
    stage = "alignment/arms/" + "".join(c if c.isalnum() else "-" for c in name)
    groups = Groups(labels, routed, int(labels.max()) + 1)
    folders = job.train_experts(stage, groups, inputs=("alignment/rows",))
    with Experts(job.base, folders) as experts:
        return experts.losses(
            rows.dev,
            routed,
            batch_size=job.config.evaluation.per_device_eval_batch_size,
            pad_token_id=padding_id(job.tokenizer),
        )[0]


def spearman(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of alignment with the *gain* in loss, with a 95 % interval over resampled `dev` rows."""
    gains = np.stack([m["gains"] for m in measured])  # (groupings, rows, metrics)
    losses = np.stack([m["losses"] for m in measured])
    generator = np.random.default_rng(0)
    result = {}
    for column, name in enumerate(METRICS):
        draws = []
        for _ in range(DRAWS):
            pick = generator.integers(0, losses.shape[1], losses.shape[1])
            draws.append(_rank(gains[:, pick, column].mean(axis=1), -losses[:, pick].mean(axis=1)))
        low, high = np.percentile(draws, [2.5, 97.5])
        value = _rank(gains[:, :, column].mean(axis=1), -losses.mean(axis=1))
        result[name] = {"mean": value, "low": float(low), "high": float(high)}
    return result


def _rank(left: np.ndarray, right: np.ndarray) -> float:
    return float(stats.spearmanr(left, right).statistic)  # type: ignore


def prepared(config: GradientSpaceConfig, seed: int) -> Job:
    """A run of its own with data and warm-up made."""
    config = dataclasses.replace(config, seed=seed, name=f"{config.name}-alignment-seed{seed}")
    return Job(pipeline.run(config, until="warmup"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--train", type=int, nargs="+", metavar="K", help="train the experts of all groupings there")
    parser.add_argument("--groupings", nargs="+", choices=GROUPINGS, default=list(TRAINED), help="those to train")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="K = 1 and 2 only")
    options = parser.parse_args(arguments)
    config = load_config(options.config)
    results: dict[str, Any] = {"machine": describe("gradientspace"), "config": options.config}
    jobs = [prepared(config, config.seed + i) for i in range(options.seeds)]
    if options.train:
        with jobs[0].run.lock():
            pipeline.train_shared(jobs[0])
            results |= {"seed": config.seed, **trained(Rows(jobs[0]), options.train, options.groupings)}
    else:
        rows_of = []
        for job in jobs:
            with job.run.lock():
                rows_of.append(Rows(job))
        results |= {"seeds": [job.config.seed for job in jobs]}
        results["table"] = table(rows_of, [1, 2] if options.quick else options.k)
    write_results(options.json, results)


if __name__ == "__main__":
    main()
