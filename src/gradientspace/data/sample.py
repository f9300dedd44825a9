"""What the data room hands on: tokenised samples and the splits they fall into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

IGNORE_INDEX = -100
"""Label of a token that carries no loss, as in transformers."""

PARTS = ("fit", "dev_a", "dev_b", "test", "warmup", "validation")
"""The splits of a `Dataset`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised conversation.

    `input_ids` and `labels` have the same length; `labels` is -100 outside the assistant's turns and their
    end-of-turn tokens, and equals `input_ids` there (the shift by one is the model's business).
    """

    id: str
    """The row's own id, or a hash of its content; unique over the whole data set."""
    prompt: str
    """What a router may see: the user's turns, joined by a newline, without any template."""
    input_ids: list[int]
    labels: list[int]
    reference: str
    """Text of the last assistant turn."""
    domain: str | None
    """A label to judge by, never to train on."""
    source: str | None
    """A label to judge by: the row's own `source`, else the name of the source it was read from."""
    row: int
    """Row in its file, the first is 1."""
    messages: list[dict[str, str]]
    """The conversation as role and content: system, user, assistant."""

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the last assistant turn: what generation starts from."""
        end = len(self.labels)
        while end and self.labels[end - 1] == IGNORE_INDEX:
            end -= 1
        while end and self.labels[end - 1] != IGNORE_INDEX:
            end -= 1
        return self.input_ids[:end]


@dataclass(frozen=True)
class Dataset:
    """The splits, each in the order of the files; `warmup` and `validation` are disjoint parts of `fit`."""

    fit: Sequence[Sample]
    dev_a: Sequence[Sample]
    dev_b: Sequence[Sample]
    test: Sequence[Sample]
    warmup: Sequence[Sample]
    validation: Sequence[Sample]
    accounting: dict[str, Any] = field(repr=False)
    """What became of every row of every file: see `gradientspace.data.accounting`."""

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each split's ids, tokens and labels: equal only for the same samples in the same order."""
        prints = {}
        for name in PARTS:
            digest = hashlib.sha256()
            for sample in getattr(self, name):
                digest.update(repr((sample.id, sample.input_ids, sample.labels)).encode())
            prints[name] = digest.hexdigest()
        return prints
