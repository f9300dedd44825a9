"""Stage II on real samples: gradients stream from the engine into the clusterer, and groups come out.

The other ways of making groups (embeddings, chance, the true source) live beside it and return the same `Groups`,
so that every compared method trains and routes through the same code.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gradientspace.assignments import Assignments
from gradientspace.clustering import MemoryPlan, OnlineSVDClusterer, RowSource, spherical_kmeans
from gradientspace.clustering.kmeans import merge_small_clusters
from gradientspace.clustering.settle import moved_share, settle_by_coordinates
from gradientspace.clustering.stability import kmeans_stability, online_stability
from gradientspace.clustering.unit_rows import Rows
from gradientspace.config import ClusteringConfig, GradientSpaceConfig
from gradientspace.conflict import FILE as GRAM_FILE
from gradientspace.conflict import unit_gram, write_gram
from gradientspace.damage import reading, require
from gradientspace.data import Dataset, Sample, take
from gradientspace.encoder import Encoder
from gradientspace.evaluation import variance_shares
from gradientspace.files import write_json
from gradientspace.gradients import GradientBatch, PerSampleGradients
from gradientspace.gradients.store import fingerprint
from gradientspace.online_pass import gather, learn
from gradientspace.pass_checkpoint import PassCheckpoint
from gradientspace.progress import Progress, say
from gradientspace.projection import ProjectedRows
from gradientspace.ranks import ranks
from gradientspace.routable import RoutableMap
from gradientspace.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from peft import PeftModel

PROJECTED = "projected.safetensors"


@dataclass
class Groups:
    """Cluster of every sample of `fit` and of the held-out rows; -1 where a sample has none."""

    fit: np.ndarray
    """(N,) int64, in the order of `data.fit`."""
    held_out: np.ndarray
    """(H,) int64, in the order of `held_out(data)`: by the sample's own gradient, to judge only; for a grouping
    without gradients, where its router sends the prompt."""
    n_clusters: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What `results.json` says of the clustering beyond its labels."""

    @property
    def sizes(self) -> list[int]:
        return np.bincount(self.fit[self.fit >= 0], minlength=self.n_clusters).tolist()

    def members(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """The samples of each cluster, in data order."""
        return [take(samples, np.flatnonzero(self.fit == k).tolist()) for k in range(self.n_clusters)]

    def write(self, folder: Path, data: Dataset) -> None:
        """`assignments.parquet`, `held_out.parquet` and `clustering.json`, where they are not there already."""
        for name, samples, labels in (
            ("assignments", data.fit, self.fit),
            ("held_out", held_out(data), self.held_out),
        ):
            if not (folder / f"{name}.parquet").exists():
                table = pa.table({"id": [s.id for s in samples], "cluster": labels})
                pq.write_table(table, folder / f"{name}.parquet")
        self.write_facts(folder)

    def write_facts(self, folder: Path) -> None:
        write_json(folder / "clustering.json", {"n_clusters": self.n_clusters, "sizes": self.sizes, **self.facts})

    @classmethod
    def read(cls, folder: Path) -> Groups:
        with reading(folder, "cluster the run again"):
            facts = json.loads((folder / "clustering.json").read_text())
            labels = [
                pq.read_table(folder / f"{name}.parquet", columns=["cluster"])["cluster"].to_numpy()
                for name in ("assignments", "held_out")
            ]
            n_clusters = facts.pop("n_clusters")
            facts.pop("sizes")
            require(type(n_clusters) is int and n_clusters >= 1, f"n_clusters is {n_clusters!r}")
            for values in labels:
                known = values.dtype.kind == "i" and np.all((values >= -1) & (values < n_clusters))
                require(known, f"a cluster is none of {n_clusters}")
            return cls(labels[0], labels[1], n_clusters, facts)


def held_out(data: Dataset) -> list[Sample]:
    """Every row outside `fit`, in the order of the recorded held-out clusters."""
    return [*data.dev_a, *data.dev_b, *data.test]


Split: TypeAlias = Literal["validation", "fit", "held_out"]


def samples_of(data: Dataset, split: Split) -> Sequence[Sample]:
    return held_out(data) if split == "held_out" else getattr(data, split)


def gradient_groups(
    model: PeftModel, data: Dataset, config: GradientSpaceConfig, encoder: Encoder, folder: Path
) -> Groups:
    """Cluster `data.fit` by full-dimension LoRA gradients of `model`'s adapter; writes the clustering folder."""
    options = config.clustering
    with PerSampleGradients(model) as engine:
        weights = fingerprint(engine, data.fit)
        width = config.gradients.projection_dim
        projected = ProjectedRows(len(data.fit), engine.dim, width, config.seed) if width else None
        checkpoint = PassCheckpoint(folder / CHECKPOINTS, weights, keep=folder / GRAM_FILE, projected=projected)
        clusterer, fit = _online_pass(engine, data, config, checkpoint)
        online = fit.cluster.copy()
        if options.target == "routable" and clusterer.n_clusters_ > 1:
            embeddings = encoder.encode([s.prompt for s in data.fit])
            _make_routable(clusterer, fit, embeddings, options, config.seed).save(folder / "routable")
        else:
            _merge_small(clusterer, fit, options.min_cluster_size)
        if options.settle == "exact":
            fit, _ = _judge(engine, clusterer, data, "fit", config)
        judged, variance = _judge(engine, clusterer, data, "held_out", config)
        ranks().broadcast(None)
    if options.settle == "coordinates":
        _settle(clusterer, fit, judged)
    fit.online_cluster = online
    reruns = (
        online_stability(fit.coordinates, fit.cluster, clusterer, random_state=config.seed)
        if fit.predicted is None
        else kmeans_stability(fit.predicted, fit.cluster, normalise=False, random_state=config.seed)
    )
    facts = {
        "dimension": engine.dim,
        "spectrum": _spectrum(clusterer),
        "stability": fit.judge_stability(reruns),
        "moved_after_online_pass": moved_share(online, fit.cluster),
        "variance": variance,
    }
    clusterer.save(folder)
    if projected:
        projected.save(folder / PROJECTED)
    fit.write(folder / "assignments.parquet")
    judged.write(folder / "held_out.parquet")
    checkpoint.remove()
    return Groups(fit.cluster, judged.cluster, clusterer.n_clusters_, facts)


def _online_pass(
    engine: PerSampleGradients, data: Dataset, config: GradientSpaceConfig, checkpoint: PassCheckpoint
) -> tuple[OnlineSVDClusterer, Assignments]:
    """Validation gradients, then one pass over `fit`; goes on from the checkpoint where there is one."""
    if (reached := checkpoint.load(engine.device)) is not None:
        clusterer, table, behind = reached
        say(f"  the online pass goes on after {behind} batches")
    else:
        clusterer, behind = new_clusterer(config.clustering, config.seed), 0
        plan = _plan(engine, clusterer, data, config)
        validation = _validation_gradients(engine, data, config, plan)
        write_gram(checkpoint.keep, [s.id for s in data.validation], unit_gram(validation))
        clusterer.initialize(validation)
        del validation
        _announce(clusterer)
        table = Assignments.empty(data.fit, len(clusterer.components_))
    if ranks().size > 1:
        checkpoint.write(clusterer, table, behind)  # where the other processes take the clusterer from
    ranks().broadcast(("learn", behind, str(checkpoint.newest)))
    learn(
        engine, clusterer, data.fit, config, behind=behind, projected=checkpoint.projected, table=table,
        checkpoint=checkpoint,
    )  # fmt: skip
    return clusterer, table


def new_clusterer(options: ClusteringConfig, seed: int) -> OnlineSVDClusterer:
    return OnlineSVDClusterer(
        n_clusters=options.n_clusters,
        random_state=seed,
        k_min=options.k_min,
        k_max=options.k_max,
        fallback_n_clusters=options.undetermined_n_clusters,
        n_components=options.n_components,
        cache_size=options.cache_size,
        momentum=options.momentum,
        update=options.update,
        center=options.center,
        n_init=options.n_init,
    )


def _plan(
    engine: PerSampleGradients, clusterer: OnlineSVDClusterer, data: Dataset, config: GradientSpaceConfig
) -> MemoryPlan:
    """Print what the pass will hold, and let caches and validation blocks shrink to the budget."""
    limit, budget = config.gradients.max_tokens_per_batch, config.clustering.memory_budget_gib
    splits = [data.validation, data.fit, held_out(data)]
    rows = max(len(batch) for samples in splits for batch in engine.plan(samples, max_tokens=limit))
    clusterer.set_params(n_validation=len(data.validation), batch_size=rows)
    plan = clusterer.plan_memory(engine.dim, None if budget is None else round(budget * 2**30))
    say(plan.table())
    clusterer.set_params(cache_size=plan.cache_size, cache_dtype=plan.cache_dtype)
    return plan


def _validation_gradients(
    engine: PerSampleGradients, data: Dataset, config: GradientSpaceConfig, plan: MemoryPlan
) -> torch.Tensor | RowSource:
    """The matrix G of raw gradients, (M, D) float32, or where it does not fit what makes its rows again."""
    samples = data.validation
    say(f"  gradients have D = {engine.dim:,} numbers; {len(samples)} of them find K and the subspace")

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with Progress("validation gradients", len(samples), "sample") as progress:
            for batch in _batches(engine, data, "validation", config):
                yield batch.indices, batch.gradients
                progress.advance(len(batch.indices))

    if plan.passes > 1:
        return RowSource(batches, (len(samples), engine.dim), plan.columns, engine.device)
    matrix = torch.zeros(len(samples), engine.dim, device=engine.device)  # a sample that is left out stays zero
    for indices, gradients in batches():
        matrix[indices.to(engine.device)] = gradients
    return matrix


def _announce(clusterer: OnlineSVDClusterer) -> None:
    estimate = clusterer.rank_estimate_
    if estimate is None:
        say(f"  K = {clusterer.n_clusters_}, as asked for")
    elif estimate.n_clusters is None:
        say(f"  K is undetermined ({estimate.reason}); using {clusterer.n_clusters_}, set clustering.n_clusters")
    else:
        say(f"  K = {clusterer.n_clusters_} ({estimate.reason}; confidence {estimate.confidence:.2f})")


def _spectrum(clusterer: OnlineSVDClusterer) -> dict[str, Any]:
    """What is known of K: the estimate with its evidence, and the energy that the kept directions hold."""
    estimate = clusterer.rank_estimate_
    energy = _array(clusterer.explained_energy_)
    kept = min(len(clusterer.components_), len(energy))
    return {
        "estimate": estimate.to_dict() if estimate else None,
        "components": kept,
        "energy_of_components": float(energy[kept - 1]),
        "singular_values": _array(clusterer.singular_values_)[:64].tolist(),
    }


def _judge(
    engine: PerSampleGradients,
    clusterer: OnlineSVDClusterer,
    data: Dataset,
    split: Split,
    config: GradientSpaceConfig,
) -> tuple[Assignments, dict[str, float]]:
    """Clusters of the samples of a split, and how much of their gradients' variance lies between the clusters.

    The variance uses uncentred unit gradients that took no part in clustering, with float64 sums.
    """
    samples = samples_of(data, split)
    table = Assignments.empty(samples, len(clusterer.components_))
    sums = torch.zeros(clusterer.n_clusters_, engine.dim, dtype=torch.float64, device=engine.device)
    counts = torch.zeros(clusterer.n_clusters_, dtype=torch.float64)
    with Progress("held-out gradients", len(samples), "sample") as progress:
        for batch in _batches(engine, data, split, config):
            assignment = clusterer.assign(batch.gradients)
            table.fill(batch, assignment)
            labels = torch.as_tensor(assignment.labels)
            usable = labels >= 0
            units = batch.gradients[usable] / batch.norms[usable, None]
            sums.index_add_(0, labels[usable], units.double())
            counts += torch.bincount(labels[usable].cpu(), minlength=len(counts))
            progress.advance(len(batch.indices))
    return table, variance_shares(counts.numpy(), _array(sums))


def _make_routable(
    clusterer: OnlineSVDClusterer,
    table: Assignments,
    embeddings: np.ndarray,
    options: ClusteringConfig,
    seed: int,
) -> RoutableMap:
    """Cluster what the prompt predicts of each gradient; its centroids, lifted back, replace the online ones."""
    routable = RoutableMap(
        clusterer.n_clusters_,
        alpha=options.ridge,
        n_init=options.n_init,
        min_cluster_size=options.min_cluster_size,
        random_state=seed,
    )
    usable = table.cluster >= 0
    routable.fit(embeddings, np.where(usable[:, None], table.coordinates, 0))
    clusterer.replace_centers(routable.lift(_array(clusterer.components_)))
    table.predicted = np.where(usable[:, None], routable.predictions_, 0).astype(np.float32)
    table.relabel(np.asarray(routable.labels_), routable.centres_.numpy())
    say(
        f"  the prompt predicts {100 * routable.explained_:.1f} % of the coordinates' variance (out of fold, "
        f"ridge penalty {routable.alpha_:g})"
    )
    return routable


def _merge_small(clusterer: OnlineSVDClusterer, table: Assignments, min_size: int) -> None:
    labels, centres, _ = merge_small_clusters(table.cluster, _array(clusterer.cluster_centers_), min_size)
    if len(centres) < clusterer.n_clusters_:
        say(f"  {clusterer.n_clusters_ - len(centres)} clusters of fewer than {min_size} samples were merged")
        clusterer.replace_centers(centres)
        table.cluster = labels


def _settle(clusterer: OnlineSVDClusterer, table: Assignments, judged: Assignments) -> None:
    """Reassign by coordinates under the final centroids, where they agree with full dimension on held-out rows."""
    settled = settle_by_coordinates(
        table.cluster,
        table.coordinates,
        _array(clusterer.cluster_centers_),
        _array(clusterer.components_),
        checked_coordinates=judged.coordinates,
        checked_labels=judged.cluster,
    )
    if settled.refused:
        say(f"  not settled: coordinates agree with full dimension on {100 * settled.agreement:.0f} % of rows only")
    table.cluster = settled.labels


def _array(values: Rows) -> np.ndarray:
    """What the clusterer holds on any device, as NumPy."""
    return torch.as_tensor(values).cpu().numpy()


def _batches(
    engine: PerSampleGradients, data: Dataset, split: Split, config: GradientSpaceConfig
) -> Iterator[GradientBatch]:
    """Gradients of a split, which every process of the run computes its share of."""
    ranks().broadcast(("gather", split))
    return gather(engine, samples_of(data, split), config)


def help_with_groups(model: PeftModel, data: Dataset, config: GradientSpaceConfig) -> None:
    """What every process but the first does while that one is in `gradient_groups`: its share of each pass."""
    width = config.gradients.projection_dim
    with PerSampleGradients(model) as engine:
        while (request := ranks().broadcast(None)) is not None:
            if request[0] == "gather":
                deque(gather(engine, samples_of(data, request[1]), config), maxlen=0)
                continue
            _, behind, folder = request
            projected = ProjectedRows(0, engine.dim, width, config.seed) if width else None
            clusterer = OnlineSVDClusterer.load(folder, str(engine.device))
            learn(engine, clusterer, data.fit, config, behind=behind, projected=projected)


def embedding_groups(data: Dataset, n_clusters: int, encoder: Encoder, seed: int) -> np.ndarray:
    """Spherical k-means of the prompts' embeddings: (N,) labels of `data.fit`."""
    embeddings = encoder.encode([s.prompt for s in data.fit])
    return np.asarray(spherical_kmeans(embeddings, n_clusters, 10, seed)[0])
