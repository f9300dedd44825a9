"""Rows on disk, for data that memory does not hold: conversations while they are read, then tokenised samples.

Both lie in a folder for temporary files (the system's, which `TMPDIR` moves) that is removed with the last object that
uses it. What stays in memory of a row is its id, hash, prompt and place.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gradientspace.data.sample import Sample
from gradientspace.data.shapes import Conversation

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1024
_TOKENS = ("input_ids", "labels")


def _schema() -> pa.Schema:
    """The columns of a sample. pyarrow takes a while to import, and most data needs no file."""
    import pyarrow as pa

    text, turn = pa.string(), pa.struct([("role", pa.string()), ("content", pa.string())])
    tokens = {name: pa.list_(pa.int32()) for name in _TOKENS}
    columns = {"id": text, "prompt": text, **tokens, "reference": text, "domain": text, "source": text}
    return pa.schema({**columns, "row": pa.int64(), "messages": pa.list_(turn)})


def _scratch_folder(owner: object) -> Path:
    """A new folder for temporary files, which is removed with its owner."""
    folder = Path(tempfile.mkdtemp(prefix="gradientspace-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


class StoredConversations:
    """A list of conversations in a file of JSON lines: `append`, then read by position."""

    def __init__(self) -> None:
        self._file = (_scratch_folder(self) / "conversations.jsonl").open("w+b")
        weakref.finalize(self, self._file.close)
        self._starts: list[int] = []

    def append(self, conversation: Conversation) -> None:
        self._starts.append(self._file.seek(0, 2))
        self._file.write(json.dumps(asdict(conversation)).encode() + b"\n")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, position: int) -> Conversation:
        self._file.seek(self._starts[position])
        return Conversation(**json.loads(self._file.readline()))


class SampleWriter:
    """Takes samples one by one; `finish` gives them as a sequence."""

    def __init__(self) -> None:
        import pyarrow as pa

        self._file, self._schema = _File(), _schema()
        self._writer = pa.ipc.new_file(str(self._file.path), self._schema)
        self._waiting: list[Sample] = []
        self._count = 0

    def append(self, sample: Sample) -> None:
        self._waiting.append(sample)
        self._count += 1
        if len(self._waiting) == _BATCH:
            self._flush()

    def finish(self) -> StoredSamples:
        """All samples, in the order in which they came."""
        self._flush()
        self._writer.close()
        return StoredSamples(self._file, np.arange(self._count))

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            columns = [_column(f, [getattr(sample, f.name) for sample in self._waiting]) for f in self._schema]
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            self._waiting = []


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    import pyarrow as pa

    if field.name not in _TOKENS:
        return pa.array(values, field.type)
    # By way of numpy: Arrow would look at every number of a list of lists twice.
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.fromiter(chain.from_iterable(values), np.int32, int(ends[-1])))


class _File:
    """A memory-mapped Arrow file whose batches hold `_BATCH` samples each."""

    def __init__(self) -> None:
        self.path = _scratch_folder(self) / "samples.arrow"

    @cached_property
    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.path)))

    def sample(self, row: int) -> Sample:
        batch, place = self._reader.get_batch(row // _BATCH), row % _BATCH
        values = {name: batch.column(name)[place] for name in batch.schema.names}
        tokens = {name: values.pop(name).values.to_numpy().tolist() for name in _TOKENS}
        return Sample(**tokens, **{name: value.as_py() for name, value in values.items()})


class StoredSamples(Sequence[Sample]):
    """Samples in a memory-mapped file, each made anew when it is asked for; a slice or `take` is another such list."""

    def __init__(self, file: _File, rows: np.ndarray) -> None:
        self._file = file
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> StoredSamples: ...
    def __getitem__(self, place: int | slice) -> Sample | StoredSamples:
        if isinstance(place, slice):
            return StoredSamples(self._file, self._rows[place])
        return self._file.sample(int(self._rows[place]))

    def take(self, positions: Sequence[int]) -> StoredSamples:
        return StoredSamples(self._file, self._rows[np.asarray(positions, dtype=np.int64)])


def take(samples: Sequence[Sample], positions: Sequence[int]) -> Sequence[Sample]:
    """The samples at `positions`: of a stored sequence without reading them, of another as a list."""
    if isinstance(samples, StoredSamples):
        return samples.take(positions)
    return [samples[i] for i in positions]
