"""The scripts behind the paper's tables and figures: the theory's own checks, and every figure from results files."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import micro_values, write_jsonl

from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.gradients import PerSampleGradients
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.routable import RoutedAlignment
from gradientspace.run_folder import Run
from gradientspace.study import Entry, table

PAPER = Path(__file__).parent.parent / "benchmarks/paper"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a script of `benchmarks/paper` by name."""
    monkeypatch.syspath_prepend(str(PAPER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_lemma_1_holds_to_machine_precision_and_fails_for_wrong_variances(script) -> None:
    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(60, 500)), np.repeat([0, 1, 2], 20)
    rows[labels == 1] += 1
    found = script("theory").lemma1(rows, labels)
    assert found["relative_error"] < 1e-14
    assert found["between"] > 0.1 * found["total"]
    # An unbiased variance inside the groups, a usual slip, would be found out.
    assert abs(found["total"] - found["within"] * 60 / 57 - found["between"]) / found["total"] > 1e-3


def test_reductions_of_a_stream_are_those_of_the_whole(script) -> None:
    theory = script("theory")
    rows, labels = torch.randn(50, 20, dtype=torch.float64), np.arange(50) % 4
    sums = theory.GroupSums({"own": labels}, 20)
    for part in torch.arange(50).split(13):
        sums.add(part, rows[part])
    whole = theory.lemma1(rows.numpy(), labels)
    assert sums.reduction("own") == pytest.approx(whole["between"] / whole["total"])


def test_theorem_3_predicts_the_floors_of_planted_quadratics(script) -> None:
    found = script("quadratics").measure_quadratics(steps=8_000)
    for row in [found["mixture"], *found["clusters"]]:
        assert row["floor"] == pytest.approx(row["predicted"], rel=0.08)
    for row in found["clusters"]:
        assert row["floor"] < found["mixture"]["floor"] < row["mixture_on_this_cluster"]
        assert row["left"] > 0.05  # fewer steps: more of the transient is left


def test_ablations_change_what_they_say(script) -> None:
    ablations = script("ablations")
    for item in ablations.ITEMS:
        configs = ablations.variants(item, PAPER / "real-mix.yaml", "runs")
        assert len({c.name for c in configs}) == len(configs)
        for config in configs:
            config.validate()
    ranks = [c.lora.lora_r for c in ablations.variants("rank", PAPER / "real-mix.yaml", "runs")]
    assert ranks == [4, 8, 16]


def test_the_ablation_of_the_rows_trained_on_keeps_its_dev_rows(script, tmp_path: Path) -> None:
    rows = [{"id": str(i), "instruction": f"Say {i} and {i * i} in words.", "input": ""} for i in range(60)]
    mix = write_jsonl(tmp_path / "mix.jsonl", [*rows, {**rows[7], "id": "again"}])
    ablations = script("ablations")

    ablations.part_rows(mix, tmp_path / "rows")

    parts = {
        name: [json.loads(line) for line in (tmp_path / f"rows/{name}.jsonl").read_text().splitlines()]
        for name in ("fit", "dev")
    }
    assert len(parts["dev"]) == 6
    assert sorted(r["id"] for part in parts.values() for r in part) == sorted([*(r["id"] for r in rows), "again"])
    assert not {r["instruction"] for r in parts["fit"]} & {r["instruction"] for r in parts["dev"]}
    configs = ablations.variants("data", PAPER / "real-mix.yaml", str(tmp_path))
    assert {c.data.dev[0].path for c in configs} == {str(tmp_path / "rows/dev.jsonl")}
    assert [c.data.train[0].weight for c in configs] == [0.1, 0.2, 0.4]


def test_the_main_config_holds_the_whole_comparison() -> None:
    config = load_config(PAPER / "real-mix.yaml").validate()
    assert {"single-wide", "random", "embedding", "elrea", "source", "gradientspace-paper"} <= set(
        config.evaluation.baselines
    )


@pytest.mark.e2e
def test_every_figure_comes_from_results_files(script, finished_run: Run, tmp_path: Path) -> None:
    """Results of a run in the place of the committed ones; each figure with its CSV."""
    results = table([Entry("micro", [finished_run])])
    (tmp_path / "ablations").mkdir()
    (tmp_path / "real-mix.json").write_text(json.dumps(results))
    variant = {**results, "methods": {"k-2-dev_b/gradientspace": results["methods"]["gradientspace"]}}
    (tmp_path / "ablations/k.json").write_text(json.dumps(variant))
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"sentence1": "red sea", "sentence2": f"blue {i}", "score": i} for i in range(12)],  # type: ignore
    )
    similarity = script("similarity").measure(finished_run, pairs, 10)
    assert all(-1 <= value <= 1.00001 for value in similarity["pairs"]["gradient"])
    (tmp_path / "similarity.json").write_text(json.dumps(similarity))
    theory = script("theory").measure_gradients(finished_run, limit=30)
    assert theory["lemma1"]["relative_error"] < 1e-12
    assert theory["theorem2"]["random"]["low"] <= theory["theorem2"]["expected_of_random"] * 3
    (tmp_path / "theory-micro.json").write_text(json.dumps(theory))
    row = {"decide_ms": 1.0, "generate_ms": 2.0}
    (tmp_path / "inference-cost.json").write_text(json.dumps({"methods_cost": {"gradientspace": row}}))
    missing = script("figures").draw(tmp_path, tmp_path / "figures")
    made = {p.stem for p in (tmp_path / "figures").glob("*.png")}
    assert made == {p.stem for p in (tmp_path / "figures").glob("*.csv")}
    assert missing == []
    assert made == set(script("figures").FIGURES)


@pytest.mark.e2e
def test_constant_step_sgd_sees_the_noise_of_what_it_draws_from(script, finished_run: Run) -> None:
    found = script("constant_step").measure_adapter(finished_run, steps=4)
    assert [row["cluster"] for row in found["clusters"]] == [0, 1]
    assert all(row["noise"] > 0 and row["own_gradient"] > 0 for row in found["clusters"])


def test_a_missing_results_file_is_named_and_left_out(script, tmp_path: Path) -> None:
    figures = script("figures")
    assert figures.draw(tmp_path, tmp_path / "out") == list(figures.FIGURES)


def test_alignment_from_inner_products_is_the_streamed_one(script, finished_run: Run, tmp_path: Path) -> None:
    alignment = script("alignment")
    rows = alignment.Rows(Job(Run.open(shutil.copytree(finished_run.path, tmp_path / "micro"))))
    labels, routed = alignment.GROUPINGS["embedding"](rows, 2)
    fit, dev = _gradients(rows, rows.fit), _gradients(rows, rows.dev)
    result = RoutedAlignment(2).add_reference(fit, labels).add_probe(dev, routed).result()
    tokens = torch.tensor([sum(label != -100 for label in s.labels) for s in rows.fit])
    steps = torch.stack([(fit * tokens[:, None])[torch.from_numpy(labels == k)].sum(dim=0) for k in range(2)])
    in_loss = (dev * torch.nn.functional.normalize(steps)[routed]).sum(dim=1).mean().item()
    own = rows.alignment(labels, routed).mean(axis=0) / 1000
    assert own == pytest.approx([result.first_order, result.unit_step, in_loss], rel=1e-4)


def _gradients(rows, samples) -> torch.Tensor:
    job = rows.job
    with (
        lora(job.base, job.config.lora, start=job.run.path / "warmup", seed=job.config.seed) as model,
        PerSampleGradients(model) as engine,
    ):
        found = torch.zeros(len(samples), engine.dim)
        for batch in engine.stream(samples):
            found[batch.indices] = batch.gradients
    return found


@pytest.mark.benchmark
@pytest.mark.e2e
def test_alignment_makes_its_table_and_its_ranking(script, micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    config = tmp_path / "mix.yaml"
    config.write_text(GradientSpaceConfig.from_dict(micro_values(micro_model, micro_mix, tmp_path)).to_yaml())
    results = tmp_path / "results.json"
    alignment = script("alignment")
    alignment.main([str(config), "--seeds", "2", "--k", "1", "2", "--json", str(results)])
    rows = {(row["k"], row["grouping"]): row for row in json.loads(results.read_text())["table"]}
    assert (1, "single") in rows
    assert all(row["unit_step"]["low"] <= row["unit_step"]["mean"] for row in rows.values())
    assert len(alignment.TRAINED) >= 8
    kept = ("random", "embedding", "routable q=64")
    alignment.main([str(config), "--train", "2", "--groupings", *kept, "--json", str(results)])
    ranking = json.loads(results.read_text())
    assert [arm["grouping"] for arm in ranking["arms"]] == list(kept)
    assert -1 <= ranking["spearman"]["K=2"]["unit_step"]["low"] <= 1
