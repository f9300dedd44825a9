"""A gradient pass that is killed goes on where its last snapshot stood."""

from pathlib import Path

import pytest
import torch
from conftest import micro_values

from gradientspace import online_pass, pass_checkpoint
from gradientspace.assignments import Assignments
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.config import GradientSpaceConfig
from gradientspace.pass_checkpoint import PassCheckpoint
from gradientspace.pipeline import run
from gradientspace.projection import ProjectedRows
from gradientspace.run_folder import Run


class Killed(BaseException):
    pass


@pytest.mark.e2e
def test_a_killed_pass_goes_on_to_the_same_bytes(
    finished_run: Run, micro_model: Path, micro_mix: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(pass_checkpoint, "INTERVAL", 0.0)
    monkeypatch.setattr(pass_checkpoint, "LARGEST_SHARE", 1e9)
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["gradients"] = {"max_tokens_per_batch": 512}
    config = GradientSpaceConfig.from_dict(values)
    expected = run(GradientSpaceConfig.from_dict(values | {"name": "whole"}), until="cluster")
    real, calls = online_pass._assign_and_push, []

    def assign_and_push(state, round, part, projected):
        calls.append(sum(len(round.held[i].indices) for i in part))
        if len(calls) == 4:
            raise Killed
        return real(state, round, part, projected)

    monkeypatch.setattr(online_pass, "_assign_and_push", assign_and_push)
    with pytest.raises(Killed):
        run(config, until="cluster")
    (snapshot,) = (config.run_folder / "clustering.partial/checkpoints").iterdir()
    assert (snapshot.name, (snapshot / "pass.json").is_file()) == ("pass-3", True)
    found = run(config, until="cluster")
    before, after = sum(calls[:3]), sum(calls[4:])
    assert before + after == len(Assignments.read(found.path / "clustering/assignments.parquet").ids)
    assert not (found.path / "clustering.partial").exists()
    files = [p.relative_to(found.path) for p in (found.path / "clustering").rglob("*") if p.is_file()]
    assert len(files) >= 5
    assert all((found.path / f).read_bytes() == (expected.path / f).read_bytes() for f in files)


def test_a_snapshot_of_another_pass_is_ignored(tmp_path: Path) -> None:
    clusterer = OnlineSVDClusterer(2, 0).initialize(torch.randn(20, 30))
    table = Assignments.empty([], 19)
    cpu, kept = torch.device("cpu"), tmp_path / "kept"
    kept.write_text("made before the pass")
    PassCheckpoint(tmp_path / "pass", "these weights", keep=kept, interval=0.0).write(clusterer, table, 3)
    kept.unlink()
    assert PassCheckpoint(tmp_path / "pass", "other weights", keep=kept).load(cpu) is None
    loaded = PassCheckpoint(tmp_path / "pass", "these weights", keep=kept).load(cpu)
    assert loaded is not None
    assert loaded[2] == 3
    assert kept.read_text() == "made before the pass"
    assert PassCheckpoint(tmp_path / "nothing", "these weights", keep=kept).load(cpu) is None


def test_snapshots_wait_for_their_turn(tmp_path: Path) -> None:
    waiting = PassCheckpoint(tmp_path / "pass", "weights", keep=tmp_path, interval=1000.0)
    assert not waiting.due()
    assert PassCheckpoint(tmp_path / "pass", "weights", keep=tmp_path, interval=0.0).due()


def test_projected_rows_are_kept_with_a_snapshot(tmp_path: Path) -> None:
    clusterer, table = OnlineSVDClusterer(2, 0).initialize(torch.randn(20, 30)), Assignments.empty([], 19)
    (tmp_path / "kept").write_text("made before the pass")
    rows = [ProjectedRows(4, 30, 16, seed=0) for _ in range(2)]
    rows[0].add(torch.tensor([1, 3]), torch.randn(2, 30))
    first, second = (
        PassCheckpoint(tmp_path / "pass", "w", keep=tmp_path / "kept", projected=each, interval=0.0) for each in rows
    )
    first.write(clusterer, table, 1)
    assert second.load(torch.device("cpu")) is not None
    assert (rows[1].rows == rows[0].rows).all()
    assert rows[1].rows.any()
