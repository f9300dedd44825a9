"""Files, folders and hub data sets -> rows as plain dicts, numbered as the user counts them.

`read_rows` is lazy: jsonl, csv and parquet are never held in memory as a whole. A row's number is its line in
a jsonl file, its place in a json array, its record below the header of a csv file, its row in a parquet file
or hub data set; the first is 1. Blank lines and records are rows whose `values` is empty.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradientspace.config import SourceConfig
from gradientspace.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
_SAME_SPLIT = {"training": "train", "testing": "test", "valid": "validation", "val": "validation"}
_HUB_FIX = "check the path or the id, and the network (HF_HUB_OFFLINE must not be set)"


@dataclass(frozen=True, slots=True)
class Row:
    file: str
    """The file as reached from the configured path, or the hub id."""
    number: int
    """1-based."""
    values: dict[str, Any]
    """Column -> value; empty for a blank line."""


def read_rows(source: SourceConfig) -> Iterator[Row]:
    """Every row of a source, in order, whatever `limit`, `weight` and `fields` say.

    Raises `DataError`: missing, empty or unreadable file, unknown extension, a row that is not an object.
    """
    for part in open_source(source):
        yield from part


class Part:
    """One file or hub split of a source; iterating reads it."""

    def __init__(self, name: str, rows: Any):
        self.name = name
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        count = 0
        for number, values in self._rows():
            count += 1
            yield Row(self.name, number, values)
        if not count:
            raise DataError(f"{self.name} is empty: it holds no rows")


def open_source(source: SourceConfig) -> list[Part]:
    """The parts of a source, their rows still unread. Raises `DataError` where there is nothing to read."""
    path = Path(source.path).expanduser()
    if path.is_file():
        return [_file_part(path)]
    if path.is_dir():
        if _is_saved_dataset(path):
            return [Part(str(path), lambda: _saved_dataset_rows(path, source.split))]
        return [_file_part(file) for file in files_of_folder(path, source.split)[0]]
    if path.suffix.lower() in _READERS or not _HUB_ID.fullmatch(source.path):
        raise DataError(f"data file {source.path} does not exist: give a file, a folder or a hub data set id")
    return [Part(source.path, lambda: _hub_rows(source))]


def skipped_files(source: SourceConfig) -> list[str]:
    """Data files in the source's folder that are not read because they belong to other splits."""
    path = Path(source.path).expanduser()
    if not path.is_dir() or _is_saved_dataset(path):
        return []
    return [str(file) for file in files_of_folder(path, source.split)[1]]


def files_of_folder(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The data files of a folder that belong to `split`, and those that do not, both sorted by path.

    Where any name says `split` (`train.jsonl`, `train/part-0.parquet`), only those files belong; otherwise
    the files that name no other split. So a folder with train and test files never trains on its test rows.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"folder {folder} holds no data file: expected {', '.join(_READERS)}")
    wanted = _SAME_SPLIT.get(split.lower(), split.lower())
    named = {file: _splits_in_name(file.relative_to(folder)) for file in files}
    chosen = [file for file in files if wanted in named[file]] or [file for file in files if not named[file]]
    if not chosen:
        found = ", ".join(sorted(set().union(*named.values())))
        raise DataError(f"folder {folder} has no file of split {split!r}, only of {found}: set `split`")
    return chosen, [file for file in files if file not in chosen]


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _splits_in_name(path: Path) -> set[str]:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return {_SAME_SPLIT.get(word, word) for word in words if word in _SPLIT_WORDS}


def _file_part(path: Path) -> Part:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise DataError(f"{path} has the unknown extension {path.suffix!r}: expected one of {known}")

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            yield from reader(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    return Part(str(path), rows)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_utf16(line, path)
                line = line.removeprefix(codecs.BOM_UTF8)
            text = _decode(line, path, f" at row {number}").strip()
            yield number, _json_object(text, path, number) if text else {}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A json array, element by element so that a fault has a row number; anything else as json lines."""
    data = path.read_bytes()
    _refuse_utf16(data, path)
    text = _decode(data.removeprefix(codecs.BOM_UTF8), path, at_line=True)
    if not text.lstrip().startswith("["):
        yield from _json_values(text, path)
        return
    position, number = text.index("[") + 1, 0
    position = _skip_space(text, position)
    while text[position : position + 1] != "]":
        number += 1
        values, position = _json_value(text, position, path, number)
        yield number, _require_object(values, path, number)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{path} is not valid JSON after row {number}: expected ',' or ']'")
    if text[position + 1 :].strip():
        raise DataError(f"{path} is not valid JSON: text after the closing ']' (row {number} is the last)")


def _json_values(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    position, number = _skip_space(text, 0), 0
    while position < len(text):
        number += 1
        values, position = _json_value(text, position, path, number)
        yield number, _require_object(values, path, number)
        position = _skip_space(text, position)


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _json_value(text: str, position: int, path: Path, number: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, number, error) from error


def _json_object(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        return _require_object(json.loads(text), path, number)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, number, error) from error


def _require_object(values: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(values, dict):
        got = json.dumps(values)[:40]
        raise DataError(f"{path}, row {number} is not an object of columns but the JSON value {got}")
    return values


def _bad_json(path: Path, number: int, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    if isinstance(error, RecursionError):
        reason = "nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        reason = f"{error.msg} ({where})"
    return DataError(f"{path}, row {number} is not valid JSON: {reason}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """RFC 4180 with a header; .tsv is separated by tabs. Every value is text."""
    with path.open("rb") as file:
        _refuse_utf16(file.read(4), path)
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses rows that are merely long
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            records = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(records, [])
            repeated = {column for column in header if header.count(column) > 1}
            if repeated:
                raise DataError(f"{path} has the column {repeated.pop()!r} twice in its header")
            for number, record in enumerate(records, start=1):
                if record and len(record) != len(header):
                    raise DataError(
                        f"{path}, row {number} has {len(record)} fields, the header {len(header)}: quote the text"
                    )
                yield number, dict(zip(header, record, strict=True)) if record else {}
    except UnicodeDecodeError:
        _decode(path.read_bytes(), path, at_line=True)
        raise
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1} is not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a readable Parquet file after row {number}: {reason}") from error


def _hub_rows(source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    datasets = _import_datasets(source.path)
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # a dozen unrelated types, which all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source.path} is no file or folder here and cannot be loaded as a hub data set ({reason}): " + _HUB_FIX
        ) from error
    yield from _numbered(rows)


def _saved_dataset_rows(folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A folder written by `datasets.Dataset.save_to_disk`."""
    datasets = _import_datasets(str(folder))
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{folder} is not a readable data set folder: {reason}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise DataError(f"{folder} has no split {split!r}, only {', '.join(map(str, rows))}: set `split`")
        rows = rows[split]
    yield from _numbered(rows)


def _numbered(rows: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, values in enumerate(rows, start=1):
        yield number, dict(values)


def _import_datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path} needs the datasets library: pip install 'gradientspace[hub]'") from error
    return datasets


def _refuse_utf16(head: bytes, path: Path) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16 text: save it as UTF-8")


def _decode(data: bytes, path: Path, where: str = "", *, at_line: bool = False) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if at_line:
            line = data.count(b"\n", 0, error.start) + 1
            where = f" at line {line}"
        raise DataError(f"{path} is not UTF-8 text{where}: {error.reason}") from error


_READERS = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
