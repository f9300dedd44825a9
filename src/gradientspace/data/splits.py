"""Which row goes where, decided once from ids and seed alone: the order of the rows changes nothing.

Groups of near-duplicate prompts, in the order of hashes of (seed, smallest id of the group), fill test, then
dev_a, then dev_b, each group where it still fits; the rest is `fit`. Test and dev rows that have sources of their
own are not taken from the training rows; such dev rows are halved in the same order. A group of more than 1 % of
the rows (and 10) is no accident but a template that its prompts share: kept together it would leave dev without
that kind of prompt, so only exact repetitions stay together in it, and its size is reported. The warm-up is drawn
from `fit` by hashes of the ids, the same share of every named source; the validation samples are drawn likewise,
uniformly, from the rest of `fit`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradientspace.config import DataConfig
from gradientspace.data.neardup import SIMILARITY, near_duplicate_groups
from gradientspace.errors import DataError

_LARGE_GROUP = 10
_LARGE_GROUP_SHARE = 0.01


@dataclass(frozen=True)
class Split:
    """Positions of rows, each list ascending."""

    fit: list[int]
    dev_a: list[int]
    dev_b: list[int]
    test: list[int]
    warmup: list[int]
    validation: list[int]
    near_duplicates: dict[str, Any]
    """Evidence for the accounting."""


def split_rows(
    ids: Sequence[str],
    prompts: Sequence[str],
    strata: Sequence[str | None],
    config: DataConfig,
    seed: int,
    *,
    hold_out_test: bool,
    hold_out_dev: bool,
) -> Split:
    """Split n rows. `ids` are unique; `strata` name the source of each row where the config names it. A part that is
    not to be held out stays empty.

    Raises `DataError` where the rows do not suffice for one row in every part.
    """
    groups, evidence = _groups(ids, prompts)
    queue = _in_order(groups, ids, seed)
    n_test = max(1, round(config.test_fraction * len(ids))) if hold_out_test and config.test_fraction else 0
    n_dev = max(2, round(config.dev_fraction * (len(ids) - n_test))) if hold_out_dev else 0
    test, queue = _fill(queue, n_test)
    dev_a, queue = _fill(queue, (n_dev + 1) // 2)
    dev_b, queue = _fill(queue, n_dev // 2)
    fit = sorted(i for group in queue for i in group)
    warmup = _warmup(fit, ids, strata, max(1, round(config.warmup_fraction * len(fit))), seed)
    rest = sorted(set(fit) - set(warmup), key=lambda i: _hash(seed, "validation", ids[i]))
    validation = sorted(rest[: config.n_validation])
    parts = {"fit": fit, "warmup": warmup, "validation": validation}
    parts |= {"dev_a": dev_a, "dev_b": dev_b} if hold_out_dev else {}
    parts |= {"test": test} if n_test else {}
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"{len(ids)} usable rows in {len(groups)} groups of different prompts leave {', '.join(empty)} "
            "without a row: give more rows"
        )
    return Split(fit, dev_a, dev_b, test, warmup, validation, evidence)


def halve(ids: Sequence[str], prompts: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """dev_a and dev_b of n rows of their own, as positions. Raises `DataError` where one of them would be empty."""
    groups, _ = _groups(ids, prompts)
    first, rest = _fill(_in_order(groups, ids, seed), (len(ids) + 1) // 2)
    second = sorted(i for group in rest for i in group)
    if not first or not second:
        raise DataError(
            f"the {len(ids)} usable rows of data.dev, in {len(groups)} groups of different prompts, do not make "
            "two halves: give more rows"
        )
    return first, second


def sample_share(ids: Sequence[str], share: float, seed: int) -> set[int]:
    """Positions of a share of the rows, drawn by hashes of their ids."""
    order = sorted(range(len(ids)), key=lambda i: _hash(seed, "weight", ids[i]))
    return set(order[: round(share * len(ids))])


def _groups(ids: Sequence[str], prompts: Sequence[str]) -> tuple[list[list[int]], dict[str, Any]]:
    # Sorted by id, so that which candidates are compared does not depend on the order of the rows.
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    roots = near_duplicate_groups([prompts[i] for i in order])
    groups = _collect(zip(roots.tolist(), order, strict=True))
    large = max(_LARGE_GROUP, _LARGE_GROUP_SHARE * len(ids))
    templated = [group for group in groups if len(group) > large]
    kept = [group for group in groups if len(group) <= large]
    for group in templated:
        kept += _collect((prompts[i], i) for i in group)
    together = [group for group in kept if len(group) > 1]
    return kept, {
        "similarity": SIMILARITY,
        "groups": len(together),
        "rows": sum(map(len, together)),
        "rows_of_templates": sum(map(len, templated)),
    }


def _in_order(groups: list[list[int]], ids: Sequence[str], seed: int) -> list[list[int]]:
    return sorted(groups, key=lambda group: _hash(seed, "split", min(ids[i] for i in group)))


def _collect(pairs: Iterable[tuple[Any, int]]) -> list[list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for key, i in pairs:
        groups[key].append(i)
    return list(groups.values())


def _fill(queue: list[list[int]], size: int) -> tuple[list[int], list[list[int]]]:
    """The first groups of the queue that fit into `size` rows, and the queue without them."""
    taken: list[int] = []
    rest = []
    for group in queue:
        if len(taken) + len(group) <= size:
            taken += group
        else:
            rest.append(group)
    return sorted(taken), rest


def _warmup(fit: list[int], ids: Sequence[str], strata: Sequence[str | None], size: int, seed: int) -> list[int]:
    """`size` rows of `fit`: every stratum gets its share, the last seats go to the largest remainders."""
    members = {key: [] for key in sorted({strata[i] or "" for i in fit})}
    for i in sorted(fit, key=lambda i: _hash(seed, "warmup", ids[i])):
        members[strata[i] or ""].append(i)
    quotas = {key: size * len(rows) / len(fit) for key, rows in members.items()}
    seats = {key: int(quota) for key, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda key: seats[key] - quotas[key])
    for key in by_remainder[: size - sum(seats.values())]:
        seats[key] += 1
    return sorted(i for key, rows in members.items() for i in rows[: seats[key]])


def _hash(seed: int, purpose: str, id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{id}".encode()).digest()
