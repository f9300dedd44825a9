"""benchmarks/gpu.py without a GPU: it refuses, and its smoke runs every section."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARK, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run("--json", tmp_path / "gpu.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.e2e
def test_the_smoke_runs_every_section_and_measures_nothing_twice(tmp_path):
    path = tmp_path / "gpu.json"
    assert run("--smoke", "--json", path, "--sections", "gradients,memory").returncode == 0
    assert set(json.loads(path.read_text())) >= {"gradients", "memory", "machine", "smoke"}
    rest = run("--smoke", "--json", path)
    assert rest.returncode == 0, rest.stderr
    assert "gradients:" not in rest.stdout
    results = json.loads(path.read_text())
    (cell,) = results["gradients"].values()
    assert set(cell["arms"]) == {"engine", "engine, packed", "floor", "loop of batch size one"}
    assert cell["smallest_cosine"] > 0.99
    (planned,) = results["memory"].values()
    assert planned["stream"]["planned_bytes"] > 0
    (routed,) = results["routed"].values()
    assert set(routed["batches"]) == {"1", "3"}
    assert results["pass"]
    assert len(results["settings"]) == 2
