"""The whole method on a micro model: what it leaves, that it resumes to the same bytes, that PEFT agrees."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import micro_values

from gradientspace.comparison import equal_budgets
from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import RunFolderError, UnsureError
from gradientspace.inference import BASE, SHARED, Experts, RoutedModel, expert_folders
from gradientspace.pipeline import STEPS, run
from gradientspace.run_folder import VOLATILE, Run

pytestmark = pytest.mark.e2e


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file that must not change from run to run."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in VOLATILE)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_results_follow_the_contract(finished_run: Run) -> None:
    results = json.loads((finished_run.path / "evaluation/results.json").read_text())
    assert list(results["methods"]) == ["base", "single", "random", "embedding", "gradientspace", "oracle"]
    for method in results["methods"].values():
        assert {"loss", "token_loss", "exact_match", "n"} <= method["overall"].keys()
        assert method["by_domain"].keys() == {"count", "repeat"}
        assert {"steps", "tokens", "parameters", "passes_per_token"} <= method.keys()
    assert sum(results["clustering"]["sizes"]) == finished_samples(finished_run)
    assert {"ari", "nmi", "purity"} == results["clustering"]["agreement"]["domain"].keys()
    assert {"accuracy", "calibration_error", "regret", "fallback_rate"} <= results["router"].keys()
    variance = results["variance"]
    assert variance["within"] + variance["between"] == pytest.approx(variance["total"], abs=1e-12)
    assert len(results["verdict"]) == 2


def finished_samples(finished: Run) -> int:
    return json.loads((finished.path / "data/accounting.json").read_text())["splits"]["fit"]


def test_every_method_spends_the_same_tokens(finished_run: Run) -> None:
    methods = json.loads((finished_run.path / "evaluation/results.json").read_text())["methods"]
    tokens = {name: methods[name]["tokens"] for name in ("single", "random", "embedding", "gradientspace")}
    assert max(tokens.values()) <= 1.01 * min(tokens.values()), tokens
    said = equal_budgets(methods)
    assert said.startswith("  the same tokens for every trained method (largest difference 0.00 %): single ")
    methods["random"]["tokens"] //= 2
    assert equal_budgets(methods).startswith("  NOT the same tokens: compare with care")


def test_assignments_hold_what_is_promised(finished_run: Run) -> None:
    table = pq.read_table(finished_run.path / "clustering/assignments.parquet")
    assert {"id", "cluster", "cosine", "margin", "norm", "loss", "coordinates"} <= set(table.column_names)
    assert len(table["coordinates"][0]) == 8
    assert set(table["cluster"].to_pylist()) <= {-1, 0, 1}


def test_stage_costs_are_recorded(finished_run: Run) -> None:
    costs = json.loads((finished_run.path / "stages.json").read_text())
    assert costs.keys() == finished_run.manifest()["stages"].keys()
    assert all(cost["seconds"] >= 0 and cost["peak_memory_bytes"] > 0 for cost in costs.values())


def test_peft_loads_every_expert_and_agrees_with_the_routed_model(finished_run: Run) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_folder = finished_run.config.model.model_name_or_path
    routed = RoutedModel.from_run(finished_run.path)
    assert routed.names == ["expert_0", "expert_1", "shared", "base"]
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.inference_mode(), routed.experts.batch([0, 1, BASE]) as model:
        mixed = model(input_ids=ids.expand(3, -1)).logits
    for k, folder in enumerate(expert_folders(finished_run.path / "experts")):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(folder)).eval()
        with torch.inference_mode():
            torch.testing.assert_close(mixed[k], plain(input_ids=ids).logits[0], atol=1e-4, rtol=0)
        assert (mixed[k] - mixed[2]).abs().max() > 1e-3
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3


def test_routed_model_routes_and_answers(finished_run: Run) -> None:
    model = RoutedModel.from_run(finished_run.path)
    prompt = "Repeat these words: cat dog sky"
    decision = model.route(prompt)
    assert decision.expert in (0, 1)
    assert decision.name == f"expert_{decision.expert}"
    assert decision.runner_up == 1 - decision.expert
    assert 0.5 <= decision.probability <= 1
    assert not decision.fallback
    messages = [{"role": "user", "content": prompt}]
    assert model.route(messages) == decision
    answer = model.generate(messages, max_new_tokens=4)
    assert answer == "".join(model.stream(prompt, max_new_tokens=4)).strip()
    others = [model.generate(prompt, expert=k, max_new_tokens=4) for k in (0, 1, SHARED, BASE)]
    assert others[decision.expert] == answer
    prompts = ["Count the letters of: sun", prompt, "Repeat these words: moon sea"]
    assert model.generate_batch(prompts, max_new_tokens=4) == [model.generate(p, max_new_tokens=4) for p in prompts]


def test_an_unsure_router_falls_back_as_its_run_says(finished_run: Run) -> None:
    model = RoutedModel.from_run(finished_run.path)
    prompt = "Repeat these words: cat dog sky"
    model.router.threshold = 1.0
    for fallback, number in (("base", BASE), ("shared", SHARED)):
        model.router.fallback = fallback
        assert model.route(prompt).name == fallback
        assert model.generate(prompt, max_new_tokens=4) == model.generate(prompt, expert=number, max_new_tokens=4)
    model.router.fallback = "error"
    with pytest.raises(UnsureError, match="below its threshold"):
        model.generate(prompt)
    assert model.generate(prompt, expert=0, max_new_tokens=1) is not None


def test_a_batch_over_several_experts_equals_one_by_one(finished_run: Run) -> None:
    from gradientspace.job import Job

    job = Job(finished_run)
    samples = job.data.test[:9]
    choice = np.array([BASE, 0, 1, 1, 0, BASE, 1, 0, 0])
    with Experts(job.base, expert_folders(finished_run.path / "experts")) as experts:
        losses, _ = experts.losses(samples, choice, batch_size=4, pad_token_id=0)
        alone = [
            experts.losses([s], np.array([k]), batch_size=1, pad_token_id=0)[0][0]
            for s, k in zip(samples, choice, strict=True)
        ]
        answers = experts.generate(
            [s.prompt_ids for s in samples],
            choice,
            job.tokenizer,
            batch_size=4,
            max_new_tokens=4,
            do_sample=False,
        )
        one = [
            experts.generate(
                [s.prompt_ids], np.array([k]), job.tokenizer, batch_size=1, max_new_tokens=4, do_sample=False
            )[0]
            for s, k in zip(samples, choice, strict=True)
        ]
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert answers == one


def test_a_second_start_does_nothing(finished_run: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_run.path.rglob("*.safetensors")}
    run(finished_run.config)
    assert {p: p.stat().st_mtime_ns for p in finished_run.path.rglob("*.safetensors")} == before


def test_data_that_changed_between_two_starts_is_refused(micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    """Labels of stage II belong to rows: other rows under them would be silently wrong."""
    mix = shutil.copytree(micro_mix, tmp_path / "mix")
    values = micro_values(micro_model, mix, tmp_path / "runs")
    run(GradientSpaceConfig.from_dict(values), until="warmup")
    lines = (mix / "train.jsonl").read_text().splitlines()
    (mix / "train.jsonl").write_text("\n".join(lines[:-7]) + "\n")
    with pytest.raises(RunFolderError, match="has changed since the run began"):
        run(GradientSpaceConfig.from_dict(values), until="cluster")


def test_one_cluster_needs_no_map_and_no_encoder(micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["clustering"]["n_clusters"] = 1
    values["router"] = {"head": "ridge"}
    values["evaluation"] = {"baselines": []}
    results = json.loads((run(GradientSpaceConfig.from_dict(values)).path / "evaluation/results.json").read_text())
    assert results["verdict"][1] == "Verdict: keep one adapter."
    methods = results["methods"]
    assert methods["gradientspace"]["overall"] == methods["single"]["overall"]  # the same start, rows and seed


def test_evaluation_follows_its_baselines(finished_run: Run) -> None:
    inputs = finished_run.manifest()["stages"]["evaluation"]["inputs"]
    assert {
        "router",
        "single",
        "experts/0",
        "baselines/random/experts/1",
        "baselines/embedding/groups",
    } <= inputs.keys()


@pytest.mark.parametrize("stage", ["clustering", "experts/1"])
def test_a_killed_run_ends_with_the_same_bytes(finished_run: Run, tmp_path: Path, stage: str) -> None:
    """SIGKILL as soon as a stage starts, then start again; the uninterrupted run is the reference."""
    values = finished_run.config.to_dict() | {"output_dir": str(tmp_path), "name": "micro"}
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(values))
    # The same number of threads as this process: sums in another order are other bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "gradientspace", "run", str(tmp_path / "micro.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"{stage} ..."):
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    resumed = run(GradientSpaceConfig.from_dict(values))
    expected, found = files_of(finished_run.path), files_of(resumed.path)
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    volatile = {"config.yaml", "report.html", *(f"figures/cost.{kind}" for kind in ("svg", "png", "csv"))}
    assert set(different) <= volatile, different  # they name the output folder, or show times


def test_steps_run_one_by_one(micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["evaluation"] = {"baselines": []}
    values["experts"] = {"start": "warmup"}
    values["clustering"] |= {
        "target": "plain",
        "n_clusters": "auto",
        "k_max": 3,
        "undetermined_n_clusters": 2,
    }
    config = GradientSpaceConfig.from_dict(values)
    made = []
    for step in STEPS:
        folder = run(config, until=step).path
        made.append(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    assert made[0] == ["data", "rows"]
    assert made[1] == ["data", "rows", "warmup"]
    assert made[2] == ["clustering", "data", "rows", "warmup"]
    assert "shared" not in made[-1]
    assert (tmp_path / "micro/report.html").read_text().startswith("<!doctype html>")


def test_other_methods_of_grouping_run_through_the_same_pipeline(
    micro_model: Path, micro_mix: Path, tmp_path: Path
) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["clustering"] = {"method": "embedding", "n_clusters": 2, "target": "plain"}
    values["evaluation"] = {"baselines": []}
    results = json.loads((run(GradientSpaceConfig.from_dict(values)).path / "evaluation/results.json").read_text())
    assert results["clustering"]["n_clusters"] == 2
    assert results["router"]["accuracy"] == 1.0  # its held-out groups are where its own router sends them
