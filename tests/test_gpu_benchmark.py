"""benchmarks/gpu.py without a GPU: it refuses, and its smoke runs every section."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("gpu")


def run(gpu: ModuleType, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(gpu, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(gpu, monkeypatch, "--json", tmp_path / "gpu.json")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "no CUDA device" in said
    assert not (tmp_path / "gpu.json").exists()


def test_a_file_of_another_machine_is_not_gone_on_with(gpu, monkeypatch, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": {"processor": "another", "gpu": "NVIDIA X", "versions": {}}}))
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, "--smoke", "--json", path)
    assert "of another machine or other versions (NVIDIA X)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L40", None)],
)
def test_the_peak_goes_by_whole_words_of_the_name(gpu, name, peak):
    assert gpu.peak_of(name) == peak


@pytest.mark.e2e
def test_the_smoke_runs_every_section_and_measures_nothing_twice(gpu, monkeypatch, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    run(gpu, monkeypatch, "--smoke", "--json", path)
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
    capsys.readouterr()
    run(gpu, monkeypatch, "--smoke", "--json", path)
    assert capsys.readouterr().out == ""
