"""The gradient passes of stage II, by one process or by several: their number never changes a bit of the result.

The plan of batches is made once for all. A *round* is a run of consecutive batches, dealt to the ranks by tokens; each
rank computes the gradients of its own. What then depends on order happens in the plan's order:

- `gather`: rank 0 gets every batch (validation, held-out rows).
- `learn`: the online pass. Centroids are frozen over a *window* of at least `clustering.sync_every` samples, so every
  rank assigns its own rows by itself. The cache of cluster k lives on rank k mod N; each unit row goes there once,
  and full caches move their centroids there. At the window's end the moved centroids go to every rank.

A batch is one matrix product wherever it is computed, and no sum is split over ranks, so nothing needs to agree
"nearly": processes on like machines with equal thread counts give equal bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradientspace.assignments import Assignments
from gradientspace.clustering import Assignment, OnlineSVDClusterer
from gradientspace.clustering.assignment import nearest_centroid
from gradientspace.clustering.centroids import Centroids, Projection
from gradientspace.config import GradientSpaceConfig
from gradientspace.data import Sample
from gradientspace.gradients import GradientBatch, PerSampleGradients
from gradientspace.gradients.engine import GRADIENT_BYTES
from gradientspace.pass_checkpoint import PassCheckpoint
from gradientspace.progress import Progress
from gradientspace.projection import ProjectedRows
from gradientspace.ranks import ranks

# Batches a rank computes before rows are exchanged: enough to deal long and short ones out evenly.
AHEAD = 4


@dataclass
class Round:
    """Consecutive batches of the plan: their numbers, the rank of each, and this rank's gradients."""

    numbers: range
    holder: dict[int, int]
    held: dict[int, GradientBatch]


@dataclass
class Seen:
    """What is recorded of a batch; every rank knows it. Arrays on the CPU, b rows."""

    batch: GradientBatch
    """Without its gradients."""
    assignment: Assignment
    projected: Any = None
    """(b, width), where projections are kept."""


def rounds(
    engine: PerSampleGradients, samples: Sequence[Sample], plan: list[list[int]], behind: int = 0
) -> Iterator[Round]:
    """The rounds of a plan from batch `behind` on. Alone, a round is one batch."""
    here = ranks()
    most_rows = here.size * max(1, GRADIENT_BYTES // (4 * engine.dim))
    start = behind
    while start < len(plan):
        stop, rows = start + 1, len(plan[start])
        while here.size > 1 and stop < min(len(plan), start + AHEAD * here.size):
            rows += len(plan[stop])
            if rows > most_rows and stop - start >= here.size:
                break
            stop += 1
        numbers = range(start, stop)
        costs = [len(plan[i]) * len(samples[plan[i][-1]].input_ids) for i in numbers]  # the last one is the longest
        holder = dict(zip(numbers, deal(costs, here.size), strict=True))
        # Padding needs no id of its own: the engine masks it.
        held = {i: engine.batch(samples, plan[i]) for i in numbers if holder[i] == here.rank}
        yield Round(numbers, holder, held)
        start = stop


def deal(costs: Sequence[int], n: int) -> list[int]:
    """Which of n ranks takes each batch: the dearest first, always to the rank with the least so far."""
    load, owner = [0] * n, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += costs[i]
    return owner


def gather(
    engine: PerSampleGradients, samples: Sequence[Sample], config: GradientSpaceConfig
) -> Iterator[GradientBatch]:
    """Every batch on rank 0, in the plan's order; elsewhere nothing is yielded, and this rank's share sent there."""
    here = ranks()
    for round in rounds(engine, samples, _plan(engine, samples, config)):
        own = {i: _facts(batch) for i, batch in round.held.items()}
        known = {i: here.broadcast(own.get(i), round.holder[i]) for i in round.numbers}
        sent = [here.send(batch.gradients, 0) for i, batch in round.held.items() if here.rank and len(batch.indices)]
        for i in round.numbers if here.rank == 0 else ():
            if not (n := len(known[i]["indices"])):
                continue
            if round.holder[i] == 0:
                yield round.held.pop(i)
                continue
            rows = here.receive(torch.empty(n, engine.dim), round.holder[i])
            parts = (value.to(engine.device) for value in (rows, known[i]["losses"], known[i]["norms"]))
            yield GradientBatch(known[i]["indices"], *parts)
        here.wait(sent)


def learn(
    engine: PerSampleGradients,
    clusterer: OnlineSVDClusterer,
    samples: Sequence[Sample],
    config: GradientSpaceConfig,
    *,
    behind: int,
    projected: ProjectedRows | None,
    table: Assignments | None = None,
    checkpoint: PassCheckpoint | None = None,
) -> None:
    """The one online pass over `samples`, from batch `behind` on: assign every sample, then let the centroids follow.

    Rank 0 fills `table`, and `projected` with the same gradients, so that baselines which project need no pass; it
    alone has the whole clusterer at the end, and offers it to `checkpoint` at the end of windows.
    """
    here, state, plan = ranks(), clusterer.state, _plan(engine, samples, config)
    ends = window_ends([len(batch) for batch in plan], config.clustering.sync_every)
    left = len(samples) - (int((table.norm > 0).sum()) if table else 0)
    with Progress("gradients", left, "sample") as progress:
        for round in rounds(engine, samples, plan, behind):
            for part in _split(round.numbers, ends):
                known = _assign_and_push(state, round, part, projected)
                if table:
                    _record(known, table, projected)
                if part[-1] in ends:
                    _sync(state)
                    if here.broadcast(checkpoint.due() if checkpoint else None):
                        _collect(state)
                        if checkpoint and table:
                            checkpoint.write(clusterer, table, part[-1] + 1)
                progress.advance(sum(len(seen.batch.indices) for seen in known))
    state.flush(_own(state))
    _sync(state)
    _collect(state)


def window_ends(sizes: Sequence[int], sync_every: int) -> set[int]:
    """Numbers of the batches after which centroids move: when `sync_every` samples have come since the last time."""
    ends, since = set(), 0
    for number, size in enumerate(sizes):
        since += size
        if since >= sync_every:
            ends.add(number)
            since = 0
    return ends


def _plan(engine: PerSampleGradients, samples: Sequence[Sample], config: GradientSpaceConfig) -> list[list[int]]:
    return engine.plan(samples, max_tokens=config.gradients.max_tokens_per_batch, seed=config.seed)


def _split(numbers: range, ends: set[int]) -> Iterator[range]:
    """Parts of a round under the same centroids."""
    start = numbers.start
    for number in numbers:
        if number in ends or number == numbers[-1]:
            yield range(start, number + 1)
            start = number + 1


def _assign_and_push(state: Centroids, round: Round, part: range, projected: ProjectedRows | None) -> list[Seen]:
    """Assign the batches of `part` under the present centroids; rows go to their caches in the plan's order."""
    here = ranks()
    views = {i: state.project(round.held[i].gradients) for i in part if round.holder[i] == here.rank}
    own = {i: _seen(round.held[i], view, projected) for i, view in views.items()}
    known = {i: _told(own.get(i), round.holder[i]) for i in part}
    rows = functools.partial(_unit_rows, state, views, known)
    sent = [
        here.send(rows(i, k), k % here.size)
        for i in views
        for k in _clusters(known[i])
        if k % here.size != here.rank
    ]  # fmt: skip
    for i in part:
        for k, n in _clusters(known[i]).items():
            if k % here.size != here.rank:
                continue
            if i in views:
                state.take(k, rows(i, k))
                continue
            empty = torch.empty(n, state.matrix.shape[1], dtype=state.caches.dtype)
            state.take(k, here.receive(empty, round.holder[i]).to(state.caches.device))
    here.wait(sent)
    return list(known.values())


def _record(known: list[Seen], table: Assignments, projected: ProjectedRows | None) -> None:
    for seen in known:
        table.fill(seen.batch, seen.assignment)
        if projected:
            projected.put(seen.batch.indices, seen.projected)


def _seen(batch: GradientBatch, view: Projection, projected: ProjectedRows | None) -> Seen:
    parts = (value.cpu() for value in nearest_centroid(view))
    rows = projected.rows_of(batch.gradients) if projected else None
    return Seen(GradientBatch(gradients=torch.empty(0), **_facts(batch)), Assignment(*parts), rows)


def _told(seen: Seen | None, source: int) -> Seen:
    """What the rank `source` saw of a batch."""
    if seen:
        assignment = {name: getattr(seen.assignment, name) for name in Assignment.__slots__}
        message = {"batch": _facts(seen.batch), "assignment": assignment, "projected": seen.projected}
        ranks().broadcast(message, source)
        return seen
    told = ranks().broadcast(None, source)
    batch = GradientBatch(gradients=torch.empty(0), **told["batch"])
    return Seen(batch, Assignment(**told["assignment"]), told["projected"])


def _facts(batch: GradientBatch) -> dict[str, Tensor]:
    """The batch without its gradients."""
    return {"indices": batch.indices, "losses": batch.losses.cpu(), "norms": batch.norms.cpu()}


def _clusters(seen: Seen) -> dict[int, int]:
    """Cluster -> how many rows of the batch it gets, in ascending order."""
    clusters, counts = seen.assignment.labels.unique(return_counts=True)  # pyright: ignore
    return {k: n for k, n in zip(clusters.tolist(), counts.tolist(), strict=True) if k >= 0}


def _unit_rows(state: Centroids, views: dict[int, Projection], known: dict[int, Seen], number: int, k: int) -> Tensor:
    index = (torch.as_tensor(known[number].assignment.labels) == k).nonzero().squeeze(1)
    return state.unit_rows(views[number], index.to(views[number].rows.device))


def _own(state: Centroids) -> range:
    """The clusters whose caches live here."""
    return range(ranks().rank, state.n_clusters, ranks().size)


def _sync(state: Centroids) -> None:
    """End of a window: every rank gets the centroids that moved, from the rank that moved them."""
    here = ranks()
    if state.update == "running":
        state.flush(_own(state))
    for source in range(here.size if here.size > 1 else 0):
        mine = [(k, float(state.strengths[k])) for k in state.moved] if source == here.rank else None
        for k, strength in here.broadcast(mine, source):
            centre = state.moved[k].cpu() if mine is not None else torch.empty_like(state.centres[k], device="cpu")
            here.broadcast_rows(centre, source)
            if mine is None:
                state.matrix[k], state.strengths[k] = centre.to(state.matrix.device), strength
    state.sync()


def _collect(state: Centroids) -> None:
    """Rank 0 gets every cache and count, to write the whole state."""
    here = ranks()
    for k in range(state.n_clusters):
        source = k % here.size
        if source == 0:
            continue
        filled, count = here.broadcast((int(state.filled[k]), int(state.counts[k])), source)
        rows = slice(0, filled) if state.update == "svd" else slice(None)
        cache = state.caches[k][rows]
        if here.rank == source and filled:
            here.wait([here.send(cache, 0)])
        if here.rank == 0:
            state.filled[k], state.counts[k] = filled, count
            if filled:
                cache.copy_(here.receive(torch.empty_like(cache, device="cpu"), source))
