"""A training that is killed goes on from its checkpoint, and ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import micro_values
from micro_training import Micro, weights

from gradientspace.config import GradientSpaceConfig
from gradientspace.pipeline import run
from gradientspace.training_checkpoints import ResumableTrainer

OFTEN = {"checkpoint_seconds": 0.0, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def micro(micro_model: Path) -> Micro:
    return Micro(micro_model)


def killed_after(micro: Micro, folder: Path, batches: int, monkeypatch: pytest.MonkeyPatch, **how) -> None:
    """Train in `folder` and stop as Ctrl-C would in the middle of that batch."""
    step, seen = ResumableTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        seen.append(1)
        if len(seen) > batches:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            micro.train(folder, **how)


# 12 batches an epoch, so a checkpoint at step 10, 20, …: in the middle of an epoch, and at the end of one (60).
@pytest.mark.parametrize(
    ("batches", "how"),
    [
        (15, {"dropout": 0.5}),
        (37, {"dropout": 0.5}),
        (65, {"dropout": 0.5, "epochs": 6.0}),
        (70, {"options": OFTEN | {"gradient_accumulation_steps": 3}, "epochs": 6.5}),
    ],
    ids=["first-epoch", "third-epoch", "epoch-end", "accumulation"],
)
def test_a_resumed_training_ends_with_the_same_bits(micro, tmp_path, monkeypatch, capsys, batches, how) -> None:
    how = {"options": OFTEN, "epochs": 4.0, **how}
    whole = micro.train(tmp_path / "whole", **how)
    how |= {"checkpoints": tmp_path / "checkpoints", "made_from": "x"}
    killed_after(micro, tmp_path / "no", batches, monkeypatch, **how)
    assert not (tmp_path / "no").exists()
    assert micro.train(tmp_path / "resumed", **how) == whole
    assert "t: continues after step " in capsys.readouterr().err
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_holds_no_pickle(micro, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "checkpoints"
    killed_after(micro, tmp_path / "no", 35, monkeypatch, options=OFTEN, epochs=4, checkpoints=folder)
    assert [p.name for p in folder.iterdir()] == ["checkpoint-30"]
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert names == {"state.safetensors", "state.json", "trainer_state.json", "hashes.json"}


def test_early_stopping_keeps_the_best_and_resumes(micro, tmp_path, monkeypatch) -> None:
    held_out = micro.make(6, seed=9)
    options = OFTEN | {"early_stopping_patience": 2, "eval_steps": 7.0, "learning_rate": 0.05}
    how = {"options": options, "epochs": 20.0, "held_out": held_out}
    whole = micro.train(tmp_path / "whole", **how)
    losses = [e["loss"] for e in whole.evaluations]
    assert whole.steps < 240
    assert len(losses) == losses.index(min(losses)) + 1 + 2
    assert whole.best_step == whole.evaluations[losses.index(min(losses))]["step"]
    how["checkpoints"] = tmp_path / "checkpoints"
    killed_after(micro, tmp_path / "no", whole.steps - 2, monkeypatch, **how)
    assert micro.train(tmp_path / "resumed", **how) == whole
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


def test_no_held_out_sample_means_no_early_stopping(micro, tmp_path, capsys) -> None:
    summary = micro.train(tmp_path / "a", options={"early_stopping_patience": 1})
    assert "no held-out sample, so no early stopping" in capsys.readouterr().err
    assert summary.evaluations == []


def test_a_checkpoint_that_does_not_fit_is_not_used(micro, tmp_path, monkeypatch, capsys) -> None:
    how = {"options": OFTEN, "epochs": 3.0, "checkpoints": tmp_path / "checkpoints"}
    micro.train(tmp_path / "whole", **how)
    killed_after(micro, tmp_path / "no", 25, monkeypatch, **how, made_from="other rows")
    micro.train(tmp_path / "a", **how, made_from="rows")
    assert "t: what its checkpoint was made from has changed; trained from the start" in capsys.readouterr().err
    killed_after(micro, tmp_path / "no", 25, monkeypatch, **how)
    (tmp_path / "checkpoints/checkpoint-20/state.safetensors").write_bytes(b"half of it")
    micro.train(tmp_path / "b", **how)
    assert "t: its checkpoint is damaged" in capsys.readouterr().err
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "whole")


def test_a_short_training_writes_no_checkpoint(micro, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ResumableTrainer, "_save_checkpoint", lambda *_: pytest.fail("a checkpoint was written"))
    micro.train(tmp_path / "a", epochs=4, checkpoints=tmp_path / "checkpoints")


def complete_checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoints/checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]


@pytest.mark.e2e
def test_a_run_killed_within_an_expert_continues_that_training(micro_model, micro_mix, tmp_path, capsys) -> None:
    """SIGKILL while an expert is trained, then the same command again; the uninterrupted run is the reference."""
    values = micro_values(micro_model, micro_mix, tmp_path / "killed")
    values["training"] |= {"num_train_epochs": 3, **OFTEN}
    values["experts"] = {"start": "warmup"}
    values["clustering"] = {"method": "random", "n_clusters": 2, "target": "plain"}  # fast, and of no matter here
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(values))
    whole = run(GradientSpaceConfig.from_dict(values | {"output_dir": str(tmp_path / "whole")}), until="experts")
    command = [sys.executable, "-m", "gradientspace", "experts", str(tmp_path / "micro.yaml")]
    # The same number of threads as this process: sums in another order are other bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    expert = tmp_path / "killed/micro/experts/1"
    partial = expert.with_name("1.partial")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        while not complete_checkpoints(partial) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not expert.exists()
    assert complete_checkpoints(partial)
    capsys.readouterr()
    run(GradientSpaceConfig.from_dict(values), until="experts")
    assert "experts/1: continues after step " in capsys.readouterr().err
    assert weights(expert) == weights(whole.path / "experts/1")
    assert (expert / "training.json").read_text() == (whole.path / "experts/1/training.json").read_text()
    assert not partial.exists()
    assert {p.name for p in expert.iterdir()} == {p.name for p in (whole.path / "experts/1").iterdir()}


@pytest.mark.e2e
def test_every_phase_of_a_run_can_stop_early(micro_model, micro_mix, tmp_path) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["training"] |= {"num_train_epochs": 8, "early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 0.05}
    values["clustering"] = {"method": "random", "n_clusters": 2, "target": "plain"}
    folder = run(GradientSpaceConfig.from_dict(values), until="experts").path
    names = ("warmup", "shared", "experts/0", "experts/1")
    phases = [json.loads((folder / name / "training.json").read_text()) for name in names]
    for phase in phases:
        losses = {e["step"]: e["loss"] for e in phase["evaluations"]}
        assert phase["best_step"] == min(losses, key=lambda step: losses[step])
        assert phase["steps"] == max(losses)
    assert phases[1]["steps"] < 4 * 14, "it would take 56 steps to the end"
