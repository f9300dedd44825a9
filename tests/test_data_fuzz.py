"""Two hundred deliberately broken files: each gives a data set whose account adds up, or one clear line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import CHATML, alpaca_rows, byte_tokenizer, config_of
from test_data_loading import PARTS, check_sums

from gradientspace.config import DataConfig
from gradientspace.data import Dataset, accounting_table, load
from gradientspace.errors import DataError

STRANGE: list[Any] = [
    None, "", "  \n", 0, -1.5, True, float("nan"), 10**40, [], {}, [[]], ["a", None], {"a": {"b": [1, None]}},
    "\x00\x01\x7f", "😀👩‍👩‍👧‍👦", "\ud800", "\u2028\u0085", "é" * 3, "{{ x }}", "-1e999", "x" * 5000,
    "</s><s>", "<|im_end|>\n<|im_start|>user\n",
    [{"role": "user", "content": "x"}], [{"from": "gpt", "value": "x"}], [{"role": "user"}],
    [{"role": "assistant", "content": ""}], [{"role": "wizard", "content": "x"}],
]  # fmt: skip
COLUMNS = ("id", "instruction", "input", "output", "prompt", "completion", "messages", "conversations",
           "text", "system", "domain", "source", "answer", "", "\u202e")  # fmt: skip


def strange_rows(rng: random.Random) -> list[Any]:
    rows: list[Any] = list(alpaca_rows(12))
    kind = rng.randrange(4)
    if kind == 1:
        rows = [
            {"messages": [{"role": "user", "content": f"q{i} x{i}"}, {"role": "assistant", "content": "a"}]}
            for i in range(12)
        ]
    if kind == 2:
        rows = [{"text": f"some text {i} x{i * 3}"} for i in range(12)]
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        place = rng.randrange(len(rows))
        action = rng.randrange(6)
        if action == 0:
            rows[place] = {rng.choice(COLUMNS): rng.choice(STRANGE) for _ in range(4)}
        elif action == 1 and isinstance(rows[place], dict):
            rows[place] = rows[place] | {rng.choice(COLUMNS): rng.choice(STRANGE)}
        elif action == 2 and isinstance(rows[place], dict) and rows[place]:
            rows[place] = dict(list(rows[place].items())[:-1])
        elif action == 3:
            rows[place] = rng.choice(STRANGE)
        elif action == 4:
            rows.insert(place, rows[rng.randrange(len(rows))])
        else:
            rows[place] = {"id": "same", "instruction": f"i{rng.random()}", "output": "o"}
    return rows


def as_bytes(rows: list[Any], suffix: str, rng: random.Random, folder: Path) -> bytes:
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    flat = [row for row in rows if isinstance(row, dict)] or [{"text": "x"}]
    columns = list({column: None for row in flat for column in row})
    texts = [{c: None if c not in row else json.dumps(row[c]) for c in columns} for row in flat]
    if suffix == ".parquet":
        table = pa.Table.from_pylist(texts) if columns else pa.table({"text": ["x"]})
        pq.write_table(table, folder / "fuzz.parquet")
        return (folder / "fuzz.parquet").read_bytes()
    separator = "," if suffix == ".csv" else "\t"
    lines = [separator.join(columns), *(separator.join(row[c] or "" for c in columns) for row in texts)]
    return "\n".join(lines).encode(errors="replace")


def damage(data: bytes, rng: random.Random) -> bytes:
    action = rng.randrange(9)
    place = rng.randrange(len(data) + 1)
    if action == 0:
        return b"\xef\xbb\xbf" + data
    if action == 1:
        return data.replace(b"\n", b"\r\n")
    if action == 2:
        return data[:place]
    if action == 3:
        return data[:place] + rng.randbytes(rng.choice([1, 4, 300])) + data[place:]
    if action == 4:
        return rng.randbytes(rng.choice([0, 1, 1000]))
    if action == 5:
        return data[:place] + b"\x00" * 3 + data[place + 3 :]
    if action == 6:
        return data.decode(errors="replace").encode("utf-16")
    if action == 7:
        return data[:place] + data[place : place + 40][::-1] + data[place + 40 :]
    return data


def outcome(config: DataConfig, tokenizer: Any) -> tuple[Dataset | None, str]:
    try:
        return load(config, tokenizer, 0), ""
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize("block", range(10))
def test_a_broken_file_gives_a_result_or_one_line(tmp_path, block):
    outcomes = []
    for number in range(block * 20, block * 20 + 20):
        rng = random.Random(number)
        suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
        path = tmp_path / f"fuzz{suffix}"
        data = as_bytes(strange_rows(rng), suffix, rng, tmp_path)
        path.write_bytes(damage(data, rng))
        overlong = rng.choice(["drop", "truncate", "error"])
        tokenizer = byte_tokenizer(rng.choice([None, CHATML]))
        config = config_of(path, max_length=300, overlong=overlong, n_validation=4)
        loaded, message = outcome(config, tokenizer)
        outcomes.append(loaded is None)
        if loaded is None:
            assert "\n" not in message, number
            assert len(message) < 600, number
        else:
            check_sums(loaded.accounting)
            kept = sum(len(getattr(loaded, part)) for part in PARTS)
            assert kept == loaded.accounting["totals"]["train"]["kept"], number
            assert accounting_table(loaded.accounting)
    assert len(set(outcomes)) == 2, "some files are read and some are refused"


def test_a_row_of_a_megabyte_is_one_too_long_row(tmp_path):
    rows = alpaca_rows(10)
    rows[3]["output"] = "word \n" * 170_000
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load(config_of(path), byte_tokenizer(), 0)
    assert loaded.accounting["files"][0]["lost"] == {"too_long": {"count": 1, "rows": [[4, 4]]}}
