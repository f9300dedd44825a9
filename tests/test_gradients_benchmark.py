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


@pytest.mark.benchmark
@pytest.mark.e2e
def test_training_steps_with_and_without_the_prompts_logits_are_timed(tmp_path):
    path = tmp_path / "results.json"
    subprocess.run([sys.executable, BENCHMARK.with_name("training.py"), "--quick", "--json", path], check=True)
    cells = json.loads(path.read_text())["cells"]
    assert [cell["prompt_share"] for cell in cells] == [0.25, 0.75]
    assert all(set(cell["arms"]) == {"all logits", "supervised rows"} for cell in cells)
