"""Other ways of making K groups; experts and router are made of them as of ours.

| name | groups | a prompt's expert |
|---|---|---|
| random | chance, the sizes of our clusters | chance |
| embedding | spherical k-means of sentence embeddings of the prompts | router |
| tfidf | k-means of the prompts' TF-IDF vectors | router |
| source | the true source | the true source |
| plain | our online pass in full dimension, without the routable map | router |
| less, projection-2048, projection-512 | k-means of the same gradients, projected to 8,192, 2,048, 512 | router |
| gradientspace-paper | `plain`; its experts start from the warm-up adapter | router |
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gradientspace.arm import Arm
from gradientspace.clustering import spherical_kmeans
from gradientspace.errors import ConfigError
from gradientspace.grouping import PROJECTED, Groups, embedding_groups, held_out
from gradientspace.inference import expert_folders
from gradientspace.job import Job
from gradientspace.projection import fold, load_rows, unit
from gradientspace.router import Router

PAPER = "gradientspace-paper"
WIDTHS = {"less": 8192, "projection-2048": 2048, "projection-512": 512}
_RESTARTS = 10


def train(job: Job, name: str) -> None:
    """Stages `baselines/NAME/groups` and `baselines/NAME/experts/…`."""
    groups_stage = f"baselines/{name}/groups"

    def make(folder: Path) -> None:
        ours = Groups.read(job.run.path / "clustering")
        make_groups(job, name, ours.n_clusters, ours.fit).write(folder, job.data)

    groups = Groups.read(job.run.stage(groups_stage, make, inputs=("clustering",)))
    if name != PAPER:
        job.train_experts(f"baselines/{name}/experts", groups, inputs=(groups_stage,))
        return
    for k, members in enumerate(groups.members(job.data.fit)):
        job.train(
            f"baselines/{name}/experts/{k}",
            lambda members=members: members,
            epochs=job.config.training.num_train_epochs,
            start=job.run.path / "warmup",
            inputs=(groups_stage, "warmup"),
        )


def arm(job: Job, name: str) -> Arm:
    experts = expert_folders(job.run.path / f"baselines/{name}/experts")
    shared = [] if name == PAPER else job.shared_stage
    return Arm(experts, Groups.read(job.run.path / f"baselines/{name}/groups").held_out, [*shared, *experts])


def make_groups(job: Job, name: str, n_clusters: int, like: np.ndarray | None = None) -> Groups:
    """Groups of a baseline; its held-out "clusters" are where its own router sends each prompt.

    Random groups take the sizes of the labels `like` (N,) where given, else equal ones.
    """
    if name == "random":
        return random_groups(job, n_clusters, like)
    if name == "source":
        return source_groups(job)
    if name == "embedding":
        return routed(job, embedding_groups(job.data, n_clusters, job.encoder, job.config.seed))
    if name == "tfidf":
        return routed(job, tfidf_labels([s.prompt for s in job.data.fit], n_clusters, job.config.seed))
    if name in ("plain", PAPER):
        return routed(job, online_labels(job))
    if name in WIDTHS:
        return routed(job, projected_labels(job, WIDTHS[name], n_clusters))
    raise ConfigError(f"{name!r} is no way of making groups")


def routed(job: Job, labels: np.ndarray) -> Groups:
    """Groups from labels (N,) of `fit`, with the router that every grouping gets; -1 stays without a group."""
    found = np.unique(labels[labels >= 0])  # an empty cluster has no expert
    labels = np.where(labels >= 0, np.searchsorted(found, labels), -1)
    router = Router(job.encoder, random_state=job.config.seed).fit([s.prompt for s in job.data.fit], labels)
    return Groups(labels, router.predict([s.prompt for s in held_out(job.data)]), len(found))


def random_groups(job: Job, n_clusters: int, like: np.ndarray | None) -> Groups:
    generator = np.random.default_rng(job.config.seed)
    sizes = like if like is not None else np.arange(len(job.data.fit)) % n_clusters
    return Groups(
        fit=generator.permutation(sizes),
        held_out=generator.integers(0, n_clusters, size=len(held_out(job.data))),
        n_clusters=n_clusters,
    )


def tfidf_labels(prompts: list[str], n_clusters: int, seed: int) -> np.ndarray:
    """K-means of unit TF-IDF vectors of words: (N,)."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=20_000).fit_transform(prompts)
    return KMeans(n_clusters, n_init=_RESTARTS, random_state=seed).fit_predict(vectors)  # type: ignore


def online_labels(job: Job) -> np.ndarray:
    """(N,) clusters of the online pass in full dimension, as the paper makes them."""
    table = pq.read_table(job.run.path / "clustering/assignments.parquet", columns=["online_cluster"])
    return table["online_cluster"].to_numpy()


def projected_labels(job: Job, width: int, n_clusters: int) -> np.ndarray:
    """(N,) spherical k-means of the projected unit gradients of the gradient pass, centred as ours are."""
    rows = unit(fold(load_rows(job.run.path / "clustering" / PROJECTED), width))
    usable = rows.any(axis=1)
    kept = rows[usable]
    if job.config.clustering.center:
        kept = unit(kept - kept.mean(axis=0))
    labels = np.full(len(rows), -1)
    labels[usable] = np.asarray(spherical_kmeans(kept, n_clusters, _RESTARTS, job.config.seed)[0])
    return labels


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
