"""The gradient benchmark still runs, in the smallest size that it has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gradients.py"


@pytest.mark.benchmark
@pytest.mark.e2e
def test_every_section_runs_and_every_arm_is_exact(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, BENCHMARK, "--quick", "--json", path, "--sections", "speed,prompts,packing,precision"]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads(path.read_text())
    arms = results["speed"]["arms"]
    assert {"engine", "floor", "loop of batch size one", "torch.func vmap"} <= set(arms)
    assert all(arm.get("largest_relative_error", 0) <= 1e-5 for arm in arms.values())
    assert results["machine"]["versions"]["torch"]
