"""The command line as users meet it: exit codes, one clear line, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import WORDS, micro_values, write_jsonl

from gradientspace.cli import main
from gradientspace.run_folder import Run

MODULES_THAT_ARE_SLOW = ("torch", "transformers", "peft", "sklearn", "numpy", "pyarrow")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Exit code 2 and exactly one line on stderr, which is returned."""
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gradientspace: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def config(micro_model: Path, micro_mix: Path, tmp_path: Path):
    """A function that writes a micro config with changes and returns its path."""

    def write(**changes: dict) -> str:
        values = micro_values(micro_model, micro_mix, tmp_path / "runs")
        for section, options in changes.items():
            values[section] = {**values.get(section, {}), **options} if isinstance(options, dict) else options
        path = tmp_path / "micro.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from gradientspace.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {MODULES_THAT_ARE_SLOW} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "compare" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("gradientspace 0.")


def test_run_help_lists_every_option_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--clustering.n-clusters" in text
    assert "estimated from the singular values" in " ".join(text.replace("│", " ").split())


def test_unknown_option_of_a_command() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["route", "runs/x", "hello", "--nope"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": \n', "row 2"),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n', "row 2"),
        (b"\x00\xff\xfe\x00garbage", "train.jsonl"),
    ],
    ids=["missing", "empty", "malformed", "without-output", "binary"],
)
def test_bad_data(content: bytes | None, message: str, config, tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad" / "train.jsonl"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    line = fails(capsys, "run", config(data={"train": [{"path": str(path)}]}))
    assert message in line
    assert not (tmp_path / "runs/micro/data").exists()


def test_bad_config_and_bad_run_folder(config, tmp_path: Path, capsys) -> None:
    assert "did you mean 'n_clusters'?" in fails(capsys, "run", config(clustering={"n_cluster": 3}))
    assert "nowhere.yaml does not exist" in fails(capsys, "run", "nowhere.yaml")
    assert "no config given" in fails(capsys, "run")
    assert "is not a run folder" in fails(capsys, "route", str(tmp_path), "hello")
    assert "is not a run folder" in fails(capsys, "report", str(tmp_path))


def test_a_model_folder_without_weights(config, micro_model: Path, tmp_path: Path, capsys) -> None:
    import shutil

    shutil.copytree(micro_model, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    line = fails(capsys, "run", config(model={"model_name_or_path": str(tmp_path / "model")}))
    assert "has no weights" in line
    assert "does not exist" in fails(
        capsys, "run", config(model={"model_name_or_path": "./no-such-model"}), "--name", "other"
    )


def test_more_clusters_than_data(config, tmp_path: Path, capsys) -> None:
    """Refused before anything is trained, and by a dry run too."""
    path = config(clustering={"n_clusters": 3000})
    for words in (["run", path], ["run", path, "--dry-run"]):
        assert "clustering.n_clusters is 3000, but there are 32 validation gradients" in fails(capsys, *words)
    path = config(clustering={"n_clusters": 3000, "method": "random"})
    assert "3000, but there are 212 rows to fit" in fails(capsys, "run", path, "--name", "random")
    assert not list((tmp_path / "runs").rglob("warmup*"))


def test_what_cannot_run_is_said_before_anything_is_trained(config, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "report_to is wandb, which is not installed" in fails(capsys, "run", config(training={"report_to": "wandb"}))
    monkeypatch.undo()
    line = fails(capsys, "run", config(model={"load_in_4bit": True, "device": "cpu"}))
    assert "model.load_in_4bit needs a CUDA device" in line
    both = config(model={"load_in_4bit": True, "load_in_8bit": True})
    assert "both on: choose one" in fails(capsys, "run", both, "--name", "both")
    wide = config(lora={"lora_r": 100}, export={"engine": "vllm"})
    assert "lora_r is 100, which vllm cannot serve" in fails(capsys, "run", wide, "--name", "wide")
    assert not list((tmp_path / "runs").rglob("adapter*"))


@pytest.mark.e2e
def test_a_dry_run_prints_every_stage_and_leaves_nothing(config, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("gradientspace.preflight.PROBE_SECONDS", 0.2)
    assert main(["run", config(), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["stage", "time"]
    assert lines[-1].startswith("all")
    assert not (tmp_path / "runs").exists()


@pytest.mark.e2e
def test_export_prints_its_files(finished_run: Run, tmp_path: Path, capsys) -> None:
    output = str(tmp_path / "out")
    assert main(["export", str(finished_run.path), "--engine", "vllm", "--output", output]) == 0
    assert "adapters/expert_0/adapter_model.safetensors" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert "is not a run folder" in fails(capsys, "export", str(tmp_path / "empty"), "--engine", "vllm")


@pytest.mark.e2e
def test_a_run_folder_of_another_config(finished_run: Run, tmp_path: Path, capsys) -> None:
    values = finished_run.config.to_dict()
    values["training"]["learning_rate"] = 0.5
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    line = fails(capsys, "run", str(tmp_path / "other.yaml"))
    assert "belongs to another config (training.learning_rate: 0.005 -> 0.5)" in line


@pytest.mark.e2e
def test_route_and_generate(finished_run: Run, capsys) -> None:
    assert main(["route", str(finished_run.path), "Count the letters of: cat dog sky"]) == 0
    assert "runner-up expert" in capsys.readouterr().out
    assert main(["route", str(finished_run.path), "Count the letters of: cat dog sky", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"expert", "probability", "runner_up", "fallback"}
    assert main(["generate", str(finished_run.path), "Repeat these words: sea", "--max-new-tokens", "3"]) == 0
    assert "[expert_" in capsys.readouterr().err


@pytest.mark.e2e
def test_report_is_remade_from_files(finished_run: Run, capsys) -> None:
    (finished_run.path / "report.html").unlink()
    assert main(["report", str(finished_run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(finished_run.path / "report.html")
    assert "<svg" in (finished_run.path / "report.html").read_text()


@pytest.mark.e2e
def test_report_lays_runs_side_by_side(finished_run: Run, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    assert main(["report", "--compare", str(finished_run.path), str(finished_run.path), "--output", str(page)]) == 0
    assert "What differs in the configs" in page.read_text()


def test_report_without_a_run_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run given" in fails(capsys, "report")


@pytest.mark.e2e
def test_compare_puts_methods_of_runs_on_one_table(finished_run: Run, tmp_path: Path, capsys) -> None:
    path = tmp_path / "table.json"
    assert main(["compare", str(finished_run.path), "--json", str(path)]) == 0
    assert "minus single" in capsys.readouterr().out
    table = json.loads(path.read_text())
    results = json.loads((finished_run.path / "evaluation/results.json").read_text())
    expected = results["comparisons"]["gradientspace - single"]["loss"]
    found = table["methods"]["gradientspace"]["difference"]["loss"]
    assert found["mean"] == pytest.approx(expected["mean"])
    assert found["low"] == pytest.approx(expected["low"], abs=0.01)
    assert table["methods"]["random"]["overall"]["exact_match"]["mean"] == pytest.approx(
        results["methods"]["random"]["overall"]["exact_match"]
    )
    assert "no method 'nope'" in fails(capsys, "compare", str(finished_run.path), "--against", "nope")


def test_data_shows_every_row_before_a_model_is_loaded(config, tmp_path: Path, capsys) -> None:
    rows = [{"instruction": f"{WORDS[i % 18]} {i} {WORDS[i % 7]}", "output": f"word {i}"} for i in range(60)]
    rows.append(rows[0])
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert main(["data", config(data={"train": [{"path": str(path)}], "test": []})]) == 0
    text = capsys.readouterr().out
    assert "duplicate" in text
    assert "### Response:" in text


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "gradientspace demo" in text
