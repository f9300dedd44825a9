"""What GradientSpace is compared with: other ways of making groups, trained and routed by the same code.

Every baseline starts from the same adapter, sees the same splits and spends the same epochs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradientspace.errors import ConfigError
from gradientspace.grouping import Groups, embedding_groups, held_out
from gradientspace.job import Job
from gradientspace.router import Router


def train_single(job: Job) -> Path:
    """Stage `single`: one adapter on all of `fit`, from the experts' start, for the experts' epochs."""
    return job.train(
        "single",
        lambda: job.data.fit,
        epochs=job.expert_epochs,
        start=job.expert_start,
        inputs=job.start_stages,
        served=True,
    )


def train_baseline(job: Job, name: str) -> None:
    """Stages `baselines/NAME/groups` and `baselines/NAME/experts/…`."""

    def make(folder: Path) -> None:
        ours = Groups.read(job.run.path / "clustering")
        make_baseline_groups(job, name, ours.n_clusters, ours.fit).write(folder, job.data)

    folder = job.run.stage(f"baselines/{name}/groups", make, inputs=("clustering",))
    job.train_experts(f"baselines/{name}/experts", Groups.read(folder), inputs=(f"baselines/{name}/groups",))


def make_baseline_groups(job: Job, name: str, n_clusters: int, like: np.ndarray | None = None) -> Groups:
    """Groups of a baseline; its held-out "clusters" are where its own router sends each prompt.

    Random groups take the sizes of the labels `like` (N,) where given, else equal ones.
    """
    everyone = held_out(job.data)
    if name == "random":
        generator = np.random.default_rng(job.config.seed)
        sizes = like if like is not None else np.arange(len(job.data.fit)) % n_clusters
        return Groups(
            fit=generator.permutation(sizes),
            held_out=generator.integers(0, n_clusters, size=len(everyone)),
            n_clusters=n_clusters,
        )
    if name == "embedding":
        labels = embedding_groups(job.data, n_clusters, job.encoder, job.config.seed)
        router = Router(job.encoder, random_state=job.config.seed).fit([s.prompt for s in job.data.fit], labels)
        return Groups(labels, router.predict([s.prompt for s in everyone]), int(labels.max()) + 1)
    if name == "source":
        return source_groups(job)
    raise ConfigError(f"unknown baseline {name!r}: known are random, embedding, source")


def source_groups(job: Job) -> Groups:
    """The true source of every sample; rows of a source that `fit` does not have are refused."""
    names = sorted({s.source or "" for s in job.data.fit})
    number = {name: k for k, name in enumerate(names)}
    unknown = sorted({s.source or "" for s in held_out(job.data)} - set(names))
    if unknown:
        raise ConfigError(f"baseline 'source' needs the sources of the test rows in training: {unknown[0]!r} is not")
    return Groups(
        fit=np.array([number[s.source or ""] for s in job.data.fit]),
        held_out=np.array([number[s.source or ""] for s in held_out(job.data)]),
        n_clusters=len(names),
        facts={"names": names},
    )
