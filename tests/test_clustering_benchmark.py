"""The clustering benchmark still runs, in the smallest size that it has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "clustering.py"


@pytest.mark.benchmark
@pytest.mark.e2e
def test_sections_run_and_a_second_call_measures_nothing_again(tmp_path):
    path = tmp_path / "results.json"
    sections = "quality,n_clusters,subspace,length,recluster"
    command = [sys.executable, BENCHMARK, "--quick", "--json", path, "--sections", sections, "--threads", "1"]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads(path.read_text())
    assert set(sections.split(",")) | {"machine"} == set(results)
    (cell,) = results["quality"].values()
    assert cell["methods"]["ceiling"]["ari final"] > 0.9
    assert cell["methods"]["online, svd"]["ari one pass"] > 0.9
    assert all(cell["right"] >= 0.5 for cell in results["n_clusters"].values())
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout == ""
