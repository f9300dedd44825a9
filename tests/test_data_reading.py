"""Files of every kind -> numbered rows, and one line of complaint for those that cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import write_jsonl

from gradientspace.config import SourceConfig
from gradientspace.data import read_rows
from gradientspace.errors import DataError

ROWS = [{"prompt": "a, b", "completion": 'say "hi"\nand go'}, {"prompt": "ü 😀", "completion": "2"}]


def rows_of(path: Path | str, **options) -> list[tuple[int, dict]]:
    return [(row.number, row.values) for row in read_rows(SourceConfig(path=str(path), **options))]


def csv_text(separator: str = ",") -> str:
    return f'prompt{separator}completion\n"a, b"{separator}"say ""hi""\nand go"\nü 😀{separator}2\n'


WRITERS = {
    "a.jsonl": lambda path: write_jsonl(path, ROWS),
    "a.ndjson": lambda path: write_jsonl(path, ROWS),
    "a.JSONL": lambda path: write_jsonl(path, ROWS),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "pretty.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "a.csv": lambda path: path.write_text(csv_text(), encoding="utf-8"),
    "a.tsv": lambda path: path.write_text(csv_text("\t"), encoding="utf-8"),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_numbered_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert rows_of(tmp_path / name) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.parquet"])
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name):
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    if name not in ("a.csv", "a.tsv"):  # there a line break may be part of a value
        data = data.replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert rows_of(tmp_path / name) == [(1, ROWS[0]), (2, ROWS[1])]


def test_row_numbers_count_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert rows_of(tmp_path / "a.jsonl") == [(1, {"a": 1}), (2, {}), (3, {}), (4, {"a": 2})]
    (tmp_path / "a.csv").write_text("a\n1\n\n2\n")
    assert rows_of(tmp_path / "a.csv") == [(1, {"a": "1"}), (2, {}), (3, {"a": "2"})]


def test_rows_of_a_megabyte_and_line_separators_inside_text_are_ordinary(tmp_path):
    text = "x\u2028y\u0085" * 200_000
    write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    assert rows_of(tmp_path / "a.jsonl") == [(1, {"text": text})]
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 1_000_000}\n")
    assert rows_of(tmp_path / "a.csv") == [(1, {"text": "x" * 1_000_000})]


BROKEN = {
    "a.txt": (b"hello", r"unknown extension '.txt': expected one of .jsonl"),
    "a.jsonl": (b'{"a": 1}\n{"a": \n{"a": 3}\n', r"row 2 is not valid JSON: Expecting value"),
    "b.jsonl": (b'{"a": 1}\n[1]\n', r"row 2 is not an object of columns but the JSON value \[1\]"),
    "c.jsonl": (b'{"a": 1}\n\xff\xfe\n', r"not UTF-8 text at row 2"),
    "d.jsonl": (b"", r"is empty: it holds no rows"),
    "e.jsonl": ("{}".encode("utf-16"), r"UTF-16 text: save it as UTF-8"),
    "f.jsonl": (
        b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        r"row 1 is not valid JSON: nested too deeply",
    ),
    "g.jsonl": (b'{"a": ' + b"9" * 10_000 + b"}", r"row 1 is not valid JSON"),
    "a.json": (b'[{"a": 1}, {"a": 2} {"a": 3}]', r"not valid JSON after row 2: expected ',' or '\]'"),
    "b.json": (b'[{"a": 1}, {"a": }]', r"row 2 is not valid JSON"),
    "c.json": (b'[{"a": 1}', r"not valid JSON after row 1"),
    "d.json": (b'[{"a": 1}] x', r"text after the closing"),
    "e.json": (b"[]", r"is empty"),
    "f.json": (b"  \n", r"is empty"),
    "g.json": (b'"text"', r"row 1 is not an object"),
    "a.csv": (b"a,b\n1,2\n3\n", r"row 2 has 1 fields, the header 2"),
    "b.csv": (b'a,b\n1,"x\n', r"row 1 is not valid CSV"),
    "c.csv": (b"a,b\n1,\xff\n", r"not UTF-8 text at line 2"),
    "h.json": (b'[{"a":\n"\xff"}]', r"not UTF-8 text at line 2"),
    "d.csv": (b"a,a\n1,2\n", r"column 'a' twice"),
    "e.csv": (b"a,b\n", r"is empty"),
    "a.parquet": (b"PAR1 and then nonsense", r"not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        rows_of(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_missing_file_and_unreadable_folder(tmp_path):
    for path in (tmp_path / "no.jsonl", tmp_path / "no" / "where", "data/none.csv"):
        with pytest.raises(DataError, match="does not exist: give a file, a folder or a hub data set id"):
            rows_of(path)
    with pytest.raises(DataError, match="holds no data file"):
        rows_of(tmp_path)


def test_folder_is_read_in_order_and_never_mixes_splits(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"a": 2}])
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    (tmp_path / "README.md").write_text("about")
    assert rows_of(tmp_path) == [(1, {"a": 1}), (1, {"a": 2})]
    write_jsonl(tmp_path / "test.jsonl", [{"a": 3}])
    assert rows_of(tmp_path) == [(1, {"a": 1}), (1, {"a": 2})]
    assert rows_of(tmp_path, split="test") == [(1, {"a": 3})]
    (tmp_path / "train").mkdir()
    write_jsonl(tmp_path / "train" / "part-00000-of-00001.jsonl", [{"a": 4}])
    assert rows_of(tmp_path) == [(1, {"a": 4})]
    for file in ("a.jsonl", "b.jsonl", "train/part-00000-of-00001.jsonl"):
        (tmp_path / file).unlink()
    with pytest.raises(DataError, match="no file of split 'train', only of test"):
        rows_of(tmp_path)


def test_saved_data_set_folder_is_read_as_such(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
    rows.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == [(1, {"question": "a", "answer": "b"})]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "two", split="test") == [(1, {"question": "a", "answer": "b"})]
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        rows_of(tmp_path / "two", split="dev")


def test_hub_id_goes_to_the_datasets_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [{"question": "a", "answer": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of("openai/gsm8k", config="main", split="test") == [(1, {"question": "a", "answer": "b"})]
    assert asked == [("openai/gsm8k", "main", "test")]


def test_hub_failures_are_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"openai/gsm8k .*\(Couldn't reach the Hub\): check the path") as error:
        rows_of("openai/gsm8k")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets library: pip install 'gradientspace\[hub\]'"):
        rows_of("openai/gsm8k")
