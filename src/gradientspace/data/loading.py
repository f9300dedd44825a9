"""`load`: sources -> conversations -> token ids and labels -> splits, with an account of every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradientspace.config import DataConfig, SourceConfig
from gradientspace.data.accounting import (
    DUPLICATE,
    EMPTY,
    LIMIT,
    NO_SUPERVISED_TOKENS,
    TOO_LONG,
    WEIGHT,
    FileAccount,
    check_losses,
    token_counts,
    totals,
)
from gradientspace.data.reading import open_source, skipped_files
from gradientspace.data.sample import IGNORE_INDEX, PARTS, Dataset, Sample
from gradientspace.data.shapes import Conversation, conversation, detect_mapping
from gradientspace.data.splits import halve, sample_share, split_rows
from gradientspace.data.store import SampleWriter, StoredConversations, take
from gradientspace.data.templates import Encoded, Template
from gradientspace.errors import ConfigError, DataError

_CHUNK = 512
_HASH_DIGITS = 16


@dataclass(slots=True)
class _Record:
    """A usable row between reading and tokenising."""

    place: int
    """Where its conversation is among all that were read."""
    id: str
    hash: str
    account: FileAccount
    row: int
    source: SourceConfig

    @property
    def where(self) -> str:
        return f"{self.account.file}, row {self.row}"


@dataclass(slots=True)
class _Loaded:
    """All that is kept of the train, the dev or the test sources."""

    ids: list[str]
    samples: Sequence[Sample]
    prompts: list[str]
    """The prompt of each sample."""
    strata: list[str | None]
    """The name the config gives the source of each sample, if any."""
    accounts: list[FileAccount]
    renamed: int
    """Ids that several rows shared and that got a suffix."""


def load(config: DataConfig, tokenizer: Any, seed: int) -> Dataset:
    """Read, tokenise and split all sources of `config`; same ids, seed and tokenizer, same splits.

    Raises `DataError` (a file or row that cannot be used, too many rows lost, too few left), `ConfigError` (a
    source's `fields`, `weight` or `limit`) and `ModelError` (a tokenizer without end token or template).
    """
    template = Template(tokenizer, config.template, config.system_prompt)
    sides: dict[str, _Loaded] = {}
    for side, sources in {"train": config.train, "dev": config.dev, "test": config.test}.items():
        if sources:
            taken = {id for other in sides.values() for id in other.ids}
            sides[side] = _load_side(side, sources, config, template, seed, taken)
    train = sides["train"]
    split = split_rows(
        train.ids,
        train.prompts,
        train.strata,
        config,
        seed,
        hold_out_test="test" not in sides,
        hold_out_dev="dev" not in sides,
    )
    places = {name: (train, getattr(split, name)) for name in PARTS}
    if dev := sides.get("dev"):
        places["dev_a"], places["dev_b"] = ((dev, half) for half in halve(dev.ids, dev.prompts, seed))
    if test := sides.get("test"):
        places["test"] = test, range(len(test.ids))
    parts = {name: take(side.samples, rows) for name, (side, rows) in places.items()}
    prompts = {name: [(side.ids[i], side.prompts[i]) for i in rows] for name, (side, rows) in places.items()}
    dev_prompts = [*prompts["dev_a"], *prompts["dev_b"]]
    accounting = {
        "schema": 1,
        "template": template.describe(),
        "files": [account.to_dict() for side in sides.values() for account in side.accounts],
        "totals": {name: totals(side.accounts) for name, side in sides.items()},
        "splits": {name: len(part) for name, part in parts.items()},
        "tokens": {name: token_counts(part) for name, part in parts.items()},
        "near_duplicates": split.near_duplicates,
        "leaks": _leaks(prompts["test"], [*prompts["fit"], *dev_prompts]),
        "dev_leaks": _leaks(dev_prompts, prompts["fit"]),
        "renamed_ids": sum(side.renamed for side in sides.values()),
        "skipped_files": [
            file for source in (*config.train, *config.dev, *config.test) for file in skipped_files(source)
        ],
    }
    accounting["warnings"] = _warnings(accounting, config)
    return Dataset(**parts, accounting=accounting)


def _leaks(held_out: list[tuple[str, str]], seen: list[tuple[str, str]]) -> dict[str, Any]:
    """The held-out (id, prompt) pairs whose prompt is among those seen."""
    known = {prompt for _, prompt in seen}
    ids = [id for id, prompt in held_out if prompt in known]
    return {"exact_prompts": len(ids), "ids": ids}


def _load_side(
    side: str, sources: list[SourceConfig], config: DataConfig, template: Template, seed: int, taken: set[str]
) -> _Loaded:
    accounts: list[FileAccount] = []
    conversations: list[Conversation] | StoredConversations = StoredConversations() if config.streaming else []
    records = [record for source in sources for record in _read(source, side, accounts, conversations)]
    renamed = _make_ids_unique(records, taken)
    records = _without_duplicates(records)
    records = _weighted(records, sources, seed)
    samples: list[Sample] | SampleWriter = SampleWriter() if config.streaming else []
    ids, prompts, strata = [], [], []
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        read = [conversations[r.place] for r in chunk]
        encoded = template.encode(read, [r.where for r in chunk])
        for record, turns, pair in zip(chunk, read, encoded, strict=True):
            fitted = _fit_length(record, pair, config)
            if fitted is not None:
                samples.append(_sample(record, turns, *fitted))
                ids.append(record.id)
                prompts.append(turns.prompt)
                strata.append(record.source.name)
    check_losses(side, totals(accounts), config.max_loss_fraction, config.max_length)
    kept = samples if isinstance(samples, list) else samples.finish()
    return _Loaded(ids, kept, prompts, strata, accounts, renamed)


def _read(
    source: SourceConfig,
    side: str,
    accounts: list[FileAccount],
    conversations: list[Conversation] | StoredConversations,
) -> Iterator[_Record]:
    if not 0 <= source.weight <= 1:
        raise ConfigError(f"weight of {source.path} is {source.weight:g}; it must be between 0 and 1")
    if source.limit is not None and source.limit < 1:
        raise ConfigError(f"limit of {source.path} is {source.limit}; it must be at least 1")
    offered = 0
    for part in open_source(source):
        account = FileAccount(side, source.name or Path(part.name).stem, part.name)
        accounts.append(account)
        for row in part:
            account.rows += 1
            offered += 1
            if source.limit is not None and offered > source.limit:
                account.lose(LIMIT, row.number)
                continue
            turns = _conversation(row.values, account, source, f"{part.name}, row {row.number}")
            if turns is None:
                account.lose(EMPTY, row.number)
                continue
            digest = turns.content_hash()
            conversations.append(turns)
            place = len(conversations) - 1
            yield _Record(place, turns.id or digest[:_HASH_DIGITS], digest, account, row.number, source)


def _conversation(
    values: dict[str, Any], account: FileAccount, source: SourceConfig, where: str
) -> Conversation | None:
    if not values:
        return None
    if account.mapping is None:
        account.mapping = detect_mapping(values, source.fields, where)
    return conversation(values, account.mapping, where)


def _make_ids_unique(records: list[_Record], taken: set[str]) -> int:
    """An id that different rows share, or that is taken, gets a suffix from the row's content hash."""
    hashes: dict[str, set[str]] = {}
    for record in records:
        hashes.setdefault(record.id, set()).add(record.hash)
    renamed = 0
    for record in records:
        if len(hashes[record.id]) > 1 or record.id in taken:
            record.id = f"{record.id}#{record.hash[:_HASH_DIGITS]}"
            renamed += 1
    return renamed


def _without_duplicates(records: list[_Record]) -> list[_Record]:
    """Of exact copies the one with the smallest id stays (the first among equals), whatever their order."""
    kept: dict[str, _Record] = {}
    for record in records:
        other = kept.setdefault(record.hash, record)
        if record.id < other.id:
            kept[record.hash] = record
    result = []
    for record in records:
        if kept[record.hash] is record:
            result.append(record)
        else:
            record.account.lose(DUPLICATE, record.row)
    return result


def _weighted(records: list[_Record], sources: list[SourceConfig], seed: int) -> list[_Record]:
    left_out: set[int] = set()
    for source in sources:
        if source.weight < 1:
            members = [i for i, record in enumerate(records) if record.source is source]
            chosen = sample_share([records[i].id for i in members], source.weight, seed)
            left_out.update(i for position, i in enumerate(members) if position not in chosen)
    for i in left_out:
        records[i].account.lose(WEIGHT, records[i].row)
    return [record for i, record in enumerate(records) if i not in left_out]


def _fit_length(record: _Record, pair: Encoded, config: DataConfig) -> Encoded | None:
    """Apply `overlong`; None where the row is lost, which its account then says."""
    ids, labels = pair
    if len(ids) > config.max_length:
        if config.overlong == "error":
            raise DataError(
                f"{record.where} has {len(ids)} tokens, more than data.max_length ({config.max_length}): "
                "raise it, or set data.overlong to drop or truncate"
            )
        if config.overlong == "drop":
            record.account.lose(TOO_LONG, record.row)
            return None
        ids, labels = ids[: config.max_length], labels[: config.max_length]
    # The first token is never predicted, so a label on it alone carries no loss.
    if all(label == IGNORE_INDEX for label in labels[1:]):
        record.account.lose(NO_SUPERVISED_TOKENS, record.row)
        return None
    if len(pair[0]) > len(ids):
        record.account.truncated.append(record.row)
    return ids, labels


def _sample(record: _Record, turns: Conversation, ids: list[int], labels: list[int]) -> Sample:
    return Sample(
        id=record.id,
        prompt=turns.prompt,
        input_ids=ids,
        labels=labels,
        reference=turns.messages[-1]["content"],
        domain=turns.domain,
        source=turns.source or record.account.source,
        row=record.row,
        messages=turns.messages,
    )


def _warnings(accounting: dict[str, Any], config: DataConfig) -> list[str]:
    warnings = []
    leaks, splits = accounting["leaks"]["exact_prompts"], accounting["splits"]
    if leaks:
        warnings.append(f"{leaks} of {splits['test']} test rows have the exact prompt of a training row")
    if leaks := accounting["dev_leaks"]["exact_prompts"]:
        n_dev = splits["dev_a"] + splits["dev_b"]
        warnings.append(f"{leaks} of {n_dev} dev rows have the exact prompt of a row that is trained on")
    if splits["validation"] < config.n_validation:
        warnings.append(
            f"only {splits['validation']} rows for validation gradients, fewer than data.n_validation "
            f"({config.n_validation})"
        )
    templated = accounting["near_duplicates"]["rows_of_templates"]
    if templated:
        warnings.append(
            f"{templated} training rows share long templates with many others; of those, only exact "
            "repetitions are kept within one split"
        )
    if accounting["renamed_ids"]:
        warnings.append(f"{accounting['renamed_ids']} rows with an id of another row got a suffix (#)")
    if accounting["skipped_files"]:
        warnings.append(f"files of other splits were not read: {', '.join(accounting['skipped_files'])}")
    return warnings
