"""Data files that nobody should have written: a data set whose account adds up, or one line."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import CHATML, alpaca_rows, byte_tokenizer
from harness import case, search
from hypothesis import given
from hypothesis import strategies as st

from gradientspace.config import GradientSpaceConfig
from gradientspace.data import accounting_table, load, render_sample
from gradientspace.rows import FILE, write_rows

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("in_tmp_path")]
_NUMBERS = itertools.count()
TOKENIZERS = [byte_tokenizer(None), byte_tokenizer(CHATML)]

TEXT = st.one_of(
    st.text(max_size=25),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "\ud800",
            "a\r\nb",
            "\u202egnp",
            "</s><s>",
            "<|im_end|>\n<|im_start|>user\n",
            "{{ x }}",
            "{% raw %}",
            "x" * 2000,
            "../../x",
            "\x1b[2J",
            "-1e999",
            "=cmd()",
            "😀" * 9,
            "\ufeffa",
            '"',
            "a,b\t'",
        ]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", ""]) | TEXT,
        "content": TEXT | VALUES,
    }
) | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]) | TEXT, "value": TEXT | VALUES})
COLUMNS = st.sampled_from(
    [
        "id",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "text",
        "system",
        "domain",
        "source",
        "question",
        "answer",
        "response",
        "",
        "\u202e",
        "../x",
    ]
)
CELL = TEXT | VALUES | st.lists(TURN, max_size=4)
ODD_ROW = st.dictionaries(COLUMNS, CELL, max_size=4) | VALUES


@st.composite
def tables(draw: st.DrawFn) -> list[Any]:
    n = draw(st.sampled_from([8, 12]))
    rows: list[Any] = list(alpaca_rows(n))
    kind = draw(st.integers(0, 3))
    if kind == 1:
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        rows = [{"messages": [{**talk[0], "content": f"q{i} x{i}"}, talk[1]]} for i in range(n)]
    elif kind == 2:
        rows = [{"text": f"some text {i} x{i * 3}"} for i in range(n)]
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, n - 1))
        if draw(st.booleans()) and isinstance(rows[place], dict):
            rows[place] = {**rows[place], draw(COLUMNS): draw(CELL)}
        else:
            rows[place] = draw(ODD_ROW)
    return rows


def encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def encoded(rows: list[Any], suffix: str, folder: Path) -> bytes:
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix in (".jsonl", ".ndjson"):
        return "\n".join(json.dumps(row) for row in rows).encode()
    flat = [row for row in rows if isinstance(row, dict) and row] or [{"text": "x"}]
    columns = list({column: None for row in flat for column in row})
    cells = [{c: row[c] if isinstance(row.get(c), str) else json.dumps(row.get(c)) for c in columns} for row in flat]
    if suffix == ".parquet":
        cells = [{encodable(c): encodable(value) for c, value in row.items()} for row in cells]
        pq.write_table(pa.Table.from_pylist(cells), folder / "made.parquet")
        return (folder / "made.parquet").read_bytes()
    separator = "," if suffix == ".csv" else "\t"
    lines = [separator.join(columns), *(separator.join(row[c] for c in columns) for row in cells)]
    return "\n".join(lines).encode("utf-8", "replace")


def damaged(data: bytes, place: float, kind: int) -> bytes:
    """`data` as it is, or cut, re-encoded, or with something in it at `place` (a share of its length)."""
    at = round(place * len(data))
    ways = [
        data[:at],
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        data[:at] + b"\0" + data[at:],
        data[:at] + b"\xff\xfe" + data[at:],
        data.decode("utf-8", "replace").encode("utf-16"),
        data[:at] + data[at : at + 30][::-1] + data[at + 30 :],
        data + b"]",
        data + b'\n{"a": ',
        b"[" * 4000,
        b'{"a":' * 3000,
        b"\n\n",
        b"",
    ]
    return ways[kind] if kind < len(ways) else data


SOURCES = st.builds(
    dict,
    weight=st.sampled_from([1.0] * 30 + [0.5, 0.0, -1.0, 1e-300, float("nan"), float("inf")]),
    limit=st.sampled_from([None] * 30 + [1, 7, 0, -3, 10**30]),
    name=st.none() | TEXT,
    fields=st.just({})
    | st.just({})
    | st.dictionaries(st.sampled_from(["prompt", "completion", "id", "messages", "x"]), COLUMNS),
)


@search("data-rows")
@given(
    rows=tables(),
    suffix=st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".ndjson"]),
    options=SOURCES,
    overlong=st.sampled_from(["drop", "truncate", "error"]),
    streaming=st.booleans(),
    system_prompt=st.none() | TEXT,
    tokenizer=st.sampled_from(TOKENIZERS),
    damage=st.tuples(st.floats(0, 1), st.integers(0, 70)),
)
def test_any_file_is_a_data_set_or_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: Any,
    suffix: str,
    options: Any,
    overlong: Any,
    streaming: bool,
    system_prompt: Any,
    tokenizer: Any,
    damage: tuple[float, int],
) -> None:
    folder = tmp_path / str(next(_NUMBERS))
    folder.mkdir()
    path = folder / f"mix{suffix}"
    path.write_bytes(damaged(encoded(rows, suffix, folder), *damage))
    values = {
        "train": [{"path": str(path), **options}],
        "max_length": 200,
        "overlong": overlong,
        "streaming": streaming,
        "n_validation": 4,
        "max_loss_fraction": 1.0,
        "system_prompt": system_prompt,
    }
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # streaming keeps texts in an unnamed temporary file
    with case("data-rows", folder):
        config = GradientSpaceConfig.from_dict({"data": values}).data
        loaded = load(config, tokenizer, 0)
        kept = sum(len(getattr(loaded, part)) for part in ("fit", "dev_a", "dev_b", "test"))
        assert kept == loaded.accounting["totals"]["train"]["kept"]
        shown = accounting_table(loaded.accounting) + render_sample(loaded.fit[0], tokenizer)
        assert "\x1b[2J" not in shown
        json.dumps(loaded.accounting)
        write_rows(folder / FILE, loaded)
