"""The run's samples as one table, `rows/rows.parquet`: report and inspect never go back to the sources.

Columns: `id, split` (fit, dev_a, dev_b, test), `source, domain, row` (in its file, the first is 1), `tokens,
supervised` (how many of them carry loss), `prompt` (what a router may see), `messages` (role and content). Rows stand
in the order fit, dev_a, dev_b, test, each in data order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from gradientspace.data import Dataset, Sample

FILE = "rows.parquet"
SPLITS = ("fit", "dev_a", "dev_b", "test")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_NOT_SUPERVISED = -100


def write_rows(path: Path, data: Dataset) -> None:
    """Write every sample of `data`; memory is that of one split's texts."""
    with pq.ParquetWriter(path, _schema(), compression="zstd") as writer:
        for split in SPLITS:
            writer.write_table(_table(split, getattr(data, split)))


def _schema() -> pa.Schema:
    numbers = [(name, pa.int64()) for name in ("row", "tokens", "supervised")]
    texts = [(name, pa.string()) for name in ("id", "split", "source", "domain")]
    return pa.schema([*texts, *numbers, ("prompt", pa.string()), ("messages", _MESSAGES)])


def _table(split: str, samples: Sequence[Sample]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "id": [s.id for s in samples],
        "split": [split] * len(samples),
        "source": [s.source for s in samples],
        "domain": [s.domain for s in samples],
        "row": [s.row for s in samples],
        "tokens": [len(s.input_ids) for s in samples],
        "supervised": [len(s.labels) - s.labels.count(_NOT_SUPERVISED) for s in samples],
        "prompt": [s.prompt for s in samples],
        "messages": [[{"role": m["role"], "content": m["content"]} for m in s.messages] for s in samples],
    }
    return pa.table(columns, schema=_schema())


def response_of(messages: Sequence[dict[str, str]]) -> str:
    """The last assistant turn: what the sample teaches."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")
