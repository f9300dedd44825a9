"""Run folder: atomic stages, hashes, resume, lock, clear errors."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import RunFolderError
from gradientspace.files import write_json, write_text
from gradientspace.run_folder import Run


def config_in(folder: Path, **values: object) -> GradientSpaceConfig:
    return GradientSpaceConfig.from_dict({"name": "r", "output_dir": str(folder), **values})


def writer(text: str, calls: list[str] | None = None):
    def make(folder: Path) -> None:
        (folder / "out.txt").write_text(text)
        if calls is not None:
            calls.append(text)

    return make


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    run = Run.create(config_in(tmp_path))
    for _ in range(2):
        assert (run.stage("a", writer("x", calls)) / "out.txt").read_text() == "x"
    assert calls == ["x"]
    assert run.manifest()["stages"]["a"]["files"].keys() == {"out.txt"}
    assert json.loads((run.path / "stages.json").read_text())["a"]["peak_memory_bytes"] > 0


def test_a_stage_is_made_again_when_its_inputs_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(config_in(tmp_path))
    run.stage("a", writer("1"))
    run.stage("b", writer("from 1"), inputs=("a",))
    run.forget("a")
    run.stage("a", writer("2"))
    run.stage("b", writer("from 2"), inputs=("a",))
    assert (run.path / "b/out.txt").read_text() == "from 2"
    assert "b: what it was made from has changed" in capsys.readouterr().err


def test_a_damaged_stage_is_named_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(config_in(tmp_path))
    run.stage("a", writer("x"))
    (run.path / "a/out.txt").write_text("y")
    run.stage("a", writer("x"))
    assert (run.path / "a/out.txt").read_text() == "x"
    assert "a: out.txt is missing or damaged" in capsys.readouterr().err


def test_a_failing_stage_leaves_nothing(tmp_path: Path) -> None:
    run = Run.create(config_in(tmp_path))

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run.stage("a", fails)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml", "versions.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_clear_line(tmp_path: Path, error: Exception, message: str) -> None:
    run = Run.create(config_in(tmp_path))

    def fails(folder: Path) -> None:
        raise error

    with pytest.raises(RunFolderError, match=message):
        run.stage("a", fails)
    assert not (run.path / "a").exists()
    assert not (run.path / "a.partial").exists()


def test_a_leftover_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    run = Run.create(config_in(tmp_path))
    for name in ("a.partial", "a"):  # killed while writing; killed between rename and manifest
        (run.path / name).mkdir()
        (run.path / name / "stale").write_text("x")
    run.stage("a", writer("x"))
    assert sorted(p.name for p in run.path.glob("a*/*")) == ["out.txt"]


def test_a_folder_of_another_config_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    Run.create(config_in(tmp_path))
    with pytest.raises(RunFolderError, match=r"belongs to another config \(seed: 0 -> 5\)"):
        Run.create(config_in(tmp_path, seed=5))


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        Run.create(config_in(tmp_path))
    with pytest.raises(RunFolderError, match="is not a run folder"):
        Run.open(tmp_path / "r")


def test_a_moved_folder_opens(tmp_path: Path) -> None:
    Run.create(config_in(tmp_path / "old")).stage("a", writer("x"))
    (tmp_path / "old").rename(tmp_path / "new")
    run = Run.open(tmp_path / "new/r")
    assert run.has("a")
    assert run.config.run_folder == tmp_path / "new/r"


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    run = Run.create(config_in(tmp_path))
    with (
        run.lock(),
        pytest.raises(RunFolderError, match="another process is working"),
        Run.open(run.path).lock(),
    ):
        pass


def test_a_missing_stage_names_the_command(tmp_path: Path) -> None:
    run = Run.create(config_in(tmp_path))
    with pytest.raises(RunFolderError, match="run `gradientspace router x` first"):
        run.require("router", "router x")


def test_a_damaged_manifest_is_one_line(tmp_path: Path) -> None:
    run = Run.create(config_in(tmp_path))
    (run.path / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"manifest\.json is damaged"):
        run.manifest()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "f", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "f", "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"
