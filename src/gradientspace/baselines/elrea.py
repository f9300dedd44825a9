"""ELREA (arXiv 2502.00089): experts of clusters of projected instruction gradients, all of them asked at inference.

1. A base adapter is trained on all data: our shared adapter where there is one, else one of its own with the same
   share of the budget.
2. At that adapter, the gradient of every sample's *instruction* tokens, randomly projected to 8,192 numbers.
3. BIRCH clusters 5,000 samples; the others join the nearest centroid by cosine.
4. One expert a cluster goes on from the base adapter.
5. For a prompt: the cosines of its projected gradient to the C centroids are standardised, their softmax weighs the
   logits of the experts and the base adapter. The paper gives the base adapter a weight too; here it is one more
   entry, whose centroid is the mean of all samples.

Our K stands for the paper's C, so that every grouping has as many experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from gradientspace.arm import Arm
from gradientspace.baselines.adapters import n_experts
from gradientspace.data.sample import IGNORE_INDEX, Sample
from gradientspace.gradients import PerSampleGradients
from gradientspace.grouping import Groups, held_out
from gradientspace.inference import expert_folders
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.progress import Progress
from gradientspace.projection import ProjectedRows, load_rows, unit

NAME = "elrea"
PREFIX = f"baselines/{NAME}"
WIDTH = 8192
SUBSET = 5_000


def train(job: Job) -> None:
    """Stages `baselines/elrea/{base, features, groups, experts/…}`; no `base` where there is a shared adapter."""
    base = train_base(job)
    job.run.stage(f"{PREFIX}/features", lambda folder: write_features(job, job.run.path / base, folder), inputs=(base,))
    stage = job.run.stage(
        f"{PREFIX}/groups", lambda folder: write_groups(job, folder), inputs=("clustering", f"{PREFIX}/features")
    )
    for k, members in enumerate(Groups.read(stage).members(job.data.fit)):
        job.train(
            f"{PREFIX}/experts/{k}",
            lambda members=members: members,
            epochs=job.config.training.num_train_epochs * (1 - job.config.experts.shared_share),
            start=job.run.path / base,
            inputs=(f"{PREFIX}/groups", base),
        )


def train_base(job: Job) -> str:
    """The stage of the adapter on all data."""
    if job.config.experts.start == "shared":
        return "shared"
    job.train(
        f"{PREFIX}/base",
        lambda: job.data.fit,
        epochs=job.config.training.num_train_epochs * job.config.experts.shared_share,
        start=job.expert_start,
        inputs=job.start_stages,
    )
    return f"{PREFIX}/base"


def arm(job: Job) -> Arm:
    """An ensemble of the base adapter and all experts."""
    base = job.run.path / ("shared" if job.config.experts.start == "shared" else f"{PREFIX}/base")
    adapters = [base, *expert_folders(job.run.path / f"{PREFIX}/experts")]
    weights = load_file(job.run.path / f"{PREFIX}/groups/weights.safetensors")["weights"]
    return Arm(adapters, weights, adapters)


def write_features(job: Job, adapter: Path, folder: Path) -> None:
    """Projected unit gradients of the instructions of `fit` and of the held-out rows."""
    with (
        lora(job.base, job.config.lora, start=adapter, seed=job.config.seed) as model,
        PerSampleGradients(model) as engine,
    ):
        for name, samples in (("fit", job.data.fit), ("held_out", held_out(job.data))):
            rows = ProjectedRows(len(samples), engine.dim, WIDTH, job.config.seed)
            instructions = [instruction_of(s) for s in samples]
            limit = job.config.gradients.max_tokens_per_batch
            with Progress("instruction gradients", len(samples), "sample") as progress:
                for batch in engine.stream(instructions, max_tokens=limit, seed=job.config.seed):
                    rows.add(batch.indices, batch.gradients)
                    progress.advance(len(batch.indices))
            rows.save(folder / f"{name}.safetensors")


def instruction_of(sample: Sample) -> Sample:
    """The sample without its last answer, supervised on every token that no assistant wrote."""
    ids = sample.prompt_ids
    by_assistant = [label != IGNORE_INDEX for label in sample.labels[: len(ids)]]
    labels = [IGNORE_INDEX if theirs else token for token, theirs in zip(ids, by_assistant, strict=True)]
    return dataclasses.replace(sample, input_ids=ids, labels=labels)


def write_groups(job: Job, folder: Path) -> None:
    features = job.run.path / f"{PREFIX}/features"
    fit, others = load_rows(features / "fit.safetensors"), load_rows(features / "held_out.safetensors")
    labels, centroids = cluster(fit, n_experts(job), job.config.seed)
    weights = ensemble_weights(others, np.vstack([unit(fit.mean(axis=0, keepdims=True)), centroids]))
    save_file({"weights": weights}, folder / "weights.safetensors")
    Groups(labels, weights[:, 1:].argmax(axis=1), len(centroids)).write(folder, job.data)


def cluster(rows: np.ndarray, n_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """BIRCH on a subset of the unit rows (N, p), every row to its nearest centroid: labels (N,), centroids (K, p)."""
    from sklearn.cluster import Birch

    subset = np.random.default_rng(seed).permutation(np.flatnonzero(rows.any(axis=1)))[:SUBSET]
    # The radius of a leaf starts at scikit-learn's and shrinks until there are leaves enough to make clusters of.
    for threshold in 0.5 ** np.arange(1, 12):
        birch = Birch(n_clusters=None, threshold=threshold).fit(rows[subset])  # type: ignore
        if len(birch.subcluster_centers_) >= n_clusters:
            break
    birch.set_params(n_clusters=min(n_clusters, len(birch.subcluster_centers_)))
    found = birch.partial_fit().predict(rows[subset])
    centroids = unit(np.stack([rows[subset][found == k].mean(axis=0) for k in np.unique(found)]))
    labels = (rows @ centroids.T).argmax(axis=1)
    kept = np.unique(labels)  # a centroid that nothing is nearest to has no expert
    return np.searchsorted(kept, labels), centroids[kept]


def ensemble_weights(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n, p) and (E, p) unit rows -> (n, E): softmax over each row's standardised cosines. No spread: equal weights."""
    cosines = (rows @ centroids.T).astype(np.float64)
    spread = cosines.std(axis=1, keepdims=True)
    scores = (cosines - cosines.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
