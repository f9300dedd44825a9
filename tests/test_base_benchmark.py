"""The script that pretrains a base still runs, in the smallest size that it has, and a finished base is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import write_jsonl

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "base.py"


@pytest.mark.benchmark
@pytest.mark.e2e
def test_a_candidate_is_trained_once_and_ranked_on_dev(tmp_path):
    numbers = range(400)
    write_jsonl(tmp_path / "pretrain.jsonl", [{"text": f"{n} plus {n} is {2 * n}. " * 4} for n in numbers])
    (tmp_path / "mix").mkdir()
    rows = [{"instruction": f"Add {n} to {3 * n}.", "output": f"It is {4 * n}."} for n in numbers]
    write_jsonl(tmp_path / "mix/train.jsonl", rows)
    out, ranking = tmp_path / "base", tmp_path / "rank.json"
    common = [sys.executable, BENCHMARK, "--quick", "--data", tmp_path, "--threads", "1"]
    subprocess.run([*common, "--out", out], check=True, capture_output=True)
    record = json.loads((out / "base.json").read_text())
    assert record["held_out_nats_a_byte"][-1]["loss"] < 5.55  # a uniform guess of the next byte
    assert not list(tmp_path.glob("*.partial"))
    again = subprocess.run([*common, "--out", out], check=True, capture_output=True, text=True)
    assert "parameters" not in again.stdout
    subprocess.run([*common, "--rank", out, "--json", ranking], check=True, capture_output=True)
    row = json.loads(ranking.read_text())["dev"][0]
    assert row["base"] == "base"
    assert 0 < row["nats_a_byte"] < 5.55
