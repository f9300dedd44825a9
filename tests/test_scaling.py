"""The cost model, the page made of it, and the simulated stream in its smallest size."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_shapes_count_what_models_have():
    """Parameters as the model cards say, D as measured by the gradient benchmark."""
    cost_model = importlib.import_module("cost_model")
    billions = {name: shape.parameters / 1e9 for name, shape in cost_model.SHAPES.items()}
    assert billions == pytest.approx(
        {"0.1B": 0.135, "0.5B": 0.494, "3B": 3.21, "8B": 8.03, "32B": 32.8, "70B": 70.6}, rel=0.01
    )
    results = json.loads((BENCHMARKS / "results/gradients.json").read_text())
    page = importlib.import_module("scaling_page")
    assert page.bench_shape(results, 8192).lora_dimension(8) == results["speed"]["model"]["dim"]


def test_the_page_shows_the_model_and_the_committed_results():
    page = importlib.import_module("scaling_page")
    text = page.PAGE.read_text()
    assert page.with_tables(text) == text


def test_agreement_from_counts_is_the_adjusted_rand_index():
    stream = importlib.import_module("simulated_stream")
    labels, truth = torch.randint(3, (200,)), torch.randint(3, (200,))
    truth[:150] = labels[:150]
    expected = adjusted_rand_score(truth, labels)
    assert stream.agreement(stream.met(labels, truth, 3)) == pytest.approx(expected)


def test_pooled_rows_are_what_is_planted_and_repeat_by_seed():
    stream = importlib.import_module("simulated_stream")
    planted = stream.Pooled(dim=1024, n_clusters=3, cosine=0.3, common=0.1)
    (labels, rows), (_, again), (_, other) = (next(planted.batches(256, seed)) for seed in (5, 5, 6))
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)
    cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    assert float(cosines[same].mean()) == pytest.approx(0.4, abs=0.03)
    assert float(cosines[labels[:, None] != labels].mean()) == pytest.approx(0.1, abs=0.03)


@pytest.mark.e2e
def test_the_simulated_stream_runs(tmp_path, monkeypatch):
    stream, path = importlib.import_module("simulated_stream"), tmp_path / "stream.json"
    monkeypatch.setattr(sys, "argv", ["simulated_stream.py", "--quick", "--json", str(path)])
    threads = torch.get_num_threads()
    stream.main()
    torch.set_num_threads(threads)
    (found,) = json.loads(path.read_text())["streams"].values()
    assert found["marks"]["8000"]["ari_held_out"] > 0.9
    assert set(found["marks"]) == {"before", "4000", "8000"}
