"""With `data.streaming` texts and tokens stay on disk, and everything else is the same."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import micro_values
from data_fixtures import CHATML, alpaca_rows, byte_tokenizer, config_of, write_jsonl

from gradientspace.config import GradientSpaceConfig
from gradientspace.data import load, take
from gradientspace.data.store import StoredSamples

PARTS = ("fit", "dev_a", "dev_b", "test", "warmup", "validation")


def mixed_rows(n: int) -> list[dict]:
    rows: list[dict] = alpaca_rows(n, domain="d", source="s")
    for i, row in enumerate(rows):
        if i % 3 == 0:
            row["system"] = "Be brief 😀"
        if i % 4 == 0:
            del row["domain"]
    rows += [dict(rows[5]), {"instruction": " ", "output": "x"}, {"instruction": "long", "output": "w " * 400}]
    return rows


@pytest.mark.parametrize("chat", [None, CHATML])
def test_streamed_data_equals_data_in_memory(tmp_path: Path, chat: str | None) -> None:
    config = config_of(write_jsonl(tmp_path / "mix.jsonl", mixed_rows(1200)), max_length=128, n_validation=64)
    tokenizer = byte_tokenizer(chat)
    plain, streamed = load(config, tokenizer, 0), load(replace(config, streaming=True), tokenizer, 0)
    assert streamed.accounting == plain.accounting
    assert streamed.fingerprint() == plain.fingerprint()
    for part in PARTS:
        ours = getattr(streamed, part)
        assert isinstance(ours, StoredSamples)
        assert list(ours) == list(getattr(plain, part))
    assert list(streamed.fit[3:9:2]) == list(plain.fit[3:9:2])
    assert streamed.fit[-1] == plain.fit[-1]
    assert list(take(streamed.fit, [7, 2, 2])) == take(plain.fit, [7, 2, 2])
    with pytest.raises(IndexError):
        streamed.fit[len(streamed.fit)]


@pytest.mark.e2e
def test_a_streamed_run_trains_the_same_adapter(micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    from gradientspace.pipeline import run

    weights = []
    for streaming in (False, True):
        values = micro_values(micro_model, micro_mix, tmp_path / str(streaming))
        values["data"]["streaming"] = streaming
        folder = run(GradientSpaceConfig.from_dict(values), until="warmup").path
        weights.append((folder / "warmup/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_streaming_holds_less_in_memory(tmp_path: Path) -> None:
    """Python's own memory of 1,000 rows of some 400 tokens; the file is mapped, not held."""
    rows = [{"instruction": f"question {i}", "output": f"{i} é" + " héllo wörld" * 60} for i in range(1000)]
    config = config_of(write_jsonl(tmp_path / "mix.jsonl", rows), max_length=4096)
    tokenizer, held = byte_tokenizer(), {}
    few = config_of(write_jsonl(tmp_path / "few.jsonl", rows[:20]), max_length=4096, streaming=True)
    load(few, tokenizer, 0)  # what is imported at first use does not count
    for streaming in (False, True):
        tracemalloc.start()
        data = load(replace(config, streaming=streaming), tokenizer, 0)
        held[streaming] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(data.fit) > 800
    assert held[True] < held[False] / 5, held
