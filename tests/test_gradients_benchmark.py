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
def test_training_steps_are_timed_by_their_logits_and_by_their_parts(tmp_path):
    path = tmp_path / "results.json"
    subprocess.run([sys.executable, BENCHMARK.with_name("training.py"), "--quick", "--json", path], check=True)
    results = json.loads(path.read_text())
    assert [cell["prompt_share"] for cell in results["cells"]] == [0.25, 0.75]
    assert all(set(cell["arms"]) == {"all logits", "supervised rows"} for cell in results["cells"])
    assert {"whole batch", "1024 tokens"} <= set(results["parts"]["arms"])
    assert 0 < results["parts"]["padding"] < 1


@pytest.mark.benchmark
@pytest.mark.e2e
def test_a_long_process_is_timed_with_sizes_as_they_come_and_repeated(tmp_path):
    path = tmp_path / "results.json"
    subprocess.run([sys.executable, BENCHMARK.with_name("long_process.py"), "--quick", "--json", path], check=True)
    arms = json.loads(path.read_text())["arms"]
    assert set(arms) == {"any size", "repeated sizes"}
    assert all(arm["late_over_early"] > 0 for arm in arms.values())
