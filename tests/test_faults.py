"""What a run folder survives: damage to any file, no space, no permission, signals, half a start, another version.

Kills at random instants and at every recorded write are `benchmarks/faults.py` (make test-faults).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import micro_values
from report_fixtures import made_up_run
from safetensors.numpy import save_file

from gradientspace import cli
from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import RunFolderError
from gradientspace.files import hashes, is_sealed, seal, write_json
from gradientspace.run_folder import Run

ROOT = Path(__file__).parent.parent
BIG = 40_000
"""Numbers in a file that does not fit, of 4 bytes or more each."""


def new_run(folder: Path) -> Run:
    return Run.create(GradientSpaceConfig.from_dict({"name": "r", "output_dir": str(folder)}))


def flip(path: Path, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------- damaged files


@pytest.mark.e2e
def test_damage_to_any_file_of_any_stage_is_named(finished_run: Run, tmp_path: Path, capsys) -> None:
    run = Run.open(shutil.copytree(finished_run.path, tmp_path / "micro"))
    stages = run.manifest()["stages"]
    assert {"data", "rows", "warmup", "clustering", "shared", "experts/0", "router", "evaluation"} <= stages.keys()
    run.check(*stages)
    for stage, entry in stages.items():
        for name in entry["files"]:
            path = run.path / stage / name
            whole = path.read_bytes()
            for harm in (flip, lambda p: os.truncate(p, p.stat().st_size // 2), Path.unlink):
                harm(path)
                with pytest.raises(RunFolderError, match="is missing or damaged"):
                    run.check(stage)
                assert not run._is_usable(stage, entry["inputs"])
                assert f"{stage}: {name} is missing or damaged (its hash differs)" in capsys.readouterr().err
                path.write_bytes(whole)
    run.check(*stages)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("router/head.safetensors", ["route", "RUN", "a prompt"]),
        ("experts/1/adapter_model.safetensors", ["generate", "RUN", "a prompt"]),
        ("experts/1/adapter_config.json", ["export", "RUN", "--engine", "vllm"]),
        ("evaluation/results.json", ["report", "RUN"]),
        ("rows/rows.parquet", ["inspect", "RUN"]),
        ("clustering/assignments.parquet", ["cluster", "RUN", "--k", "2"]),
        ("evaluation/samples.parquet", ["compare", "RUN"]),
    ],
)
def test_no_command_uses_a_damaged_file(finished_run: Run, tmp_path: Path, capsys, file: str, words: list[str]) -> None:
    folder = shutil.copytree(finished_run.path, tmp_path / "micro")
    flip(folder / file)
    assert cli.main([str(folder) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"gradientspace: error: {folder / file} is missing or damaged (its hash differs): ")
    assert said[-1].endswith("config.yaml` makes it again")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "stages": {"a": {"files": {}}}}'])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    run = new_run(tmp_path)
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"manifest\.json is damaged: remove it to make every stage again"):
        run.stage("a", lambda folder: None)


def test_another_version_is_refused_and_says_which_one_made_it(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_json(run.path / "manifest.json", {"schema": 0, "stages": []})
    with pytest.raises(RunFolderError, match=r"has schema 0, and .* reads 1: use the version that .*versions\.json"):
        run.stage("a", lambda folder: None)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}'])
def test_damaged_times_lose_times_only(tmp_path: Path, capsys, text: str) -> None:
    run = new_run(tmp_path)
    run.stage("a", lambda folder: None)
    (run.path / "stages.json").write_text(text)
    run.stage("b", lambda folder: None)
    assert run.costs().keys() == {"b"}
    assert "stages.json is damaged: times and memory" in capsys.readouterr().err


def test_a_page_is_not_made_of_damaged_files(tmp_path: Path) -> None:
    from gradientspace.report import write_report

    run = made_up_run(tmp_path / "made-up", n=60)
    (run.path / "data/accounting.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"data/accounting\.json is missing or damaged"):
        write_report(run)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda p: p.with_name("more").write_text("x")])
def test_a_seal_sees_every_change(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 9)
    assert not is_sealed(tmp_path)
    seal(tmp_path)
    assert is_sealed(tmp_path)
    harm(tmp_path / "b")
    assert not is_sealed(tmp_path)


def test_a_damaged_seal_seals_nothing(tmp_path: Path) -> None:
    seal(tmp_path)
    (tmp_path / "hashes.json").write_text("{")
    assert not is_sealed(tmp_path)


# ----------------------------------------------------------------------------------------- half a start


@pytest.mark.parametrize(
    "left", [[], [".lock"], [".lock", ".versions.json.tmp"], [".lock", "versions.json", ".config.yaml.tmp"]]
)
def test_a_start_killed_before_its_config_was_written_goes_on(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "r").mkdir()
    for name in left:
        (tmp_path / "r" / name).write_text("half")
    run = new_run(tmp_path)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml", "versions.json"]
    assert json.loads((run.path / "versions.json").read_text())


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    config = GradientSpaceConfig.from_dict({"name": "r", "output_dir": str(tmp_path)})
    (tmp_path / "r").mkdir()
    with Run(tmp_path / "r", config).lock(), pytest.raises(RunFolderError, match="another process is working on"):
        Run.create(config)
    assert not (tmp_path / "r/config.yaml").exists()


def test_a_demo_killed_between_its_report_and_its_cards_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    from gradientspace.demo import command

    run = made_up_run(tmp_path / "demo", n=60)
    (run.path / "report.html").write_text("all of it")
    monkeypatch.setattr(command, "_run", lambda *_: (run.path / "README.md").write_text("the last card"))
    monkeypatch.setattr(command, "summary", lambda *_: "")
    for finished in (False, True):
        command.demo("none", tmp_path, seed=0, fresh=False)
        assert ("is finished already" in capsys.readouterr().err) == finished


def test_a_stage_in_the_manifest_has_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two files, the stage is made again: there is never a stage without its cost."""
    run = new_run(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            run.stage("a", lambda folder: None)
    assert run.costs().keys() == {"a"}
    assert not run.has("a")


# ------------------------------------------------------------------------------ no space, no permission


def json_file(folder: Path) -> None:
    write_json(folder / "out.json", list(range(BIG)))


def tensors(folder: Path) -> None:
    save_file({"x": np.zeros(BIG, np.float32)}, folder / "out.safetensors")


def table(folder: Path) -> None:
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(BIG)}), folder / "out.parquet")


WRITERS = pytest.mark.parametrize("write", [json_file, tensors, table])


@WRITERS
def test_a_limit_on_file_sizes_is_one_clear_line(tmp_path: Path, write: Callable[[Path], None]) -> None:
    run = new_run(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RunFolderError, match=r"a file grew over the limit"):
            run.stage("a", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (run.path / "a.partial").exists()
    run.stage("a", write)
    run.check("a")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`; skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@WRITERS
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with mounted(tmp_path / "small", "size=128k") as folder:
        run = new_run(folder)
        run.stage("before", lambda to: write_json(to / "kept.json", [1]))
        with pytest.raises(
            RunFolderError, match=r"cannot write to .*: the disk is full: free some space and start the"
        ):
            run.stage("a", write)
        assert run.manifest()["stages"].keys() == {"before"}
        run.check("before")
        subprocess.run(["mount", "-o", "remount,size=2m", str(folder)], check=True)
        run.stage("a", write)
        run.check("before", "a")


def test_a_read_only_file_system_is_one_clear_line(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "size=128k") as folder:
        run = new_run(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for attempt in (
            lambda: run.stage("a", json_file),
            lambda: run.lock().__enter__(),
            lambda: new_run(folder / "x"),
        ):
            with pytest.raises(
                RunFolderError, match=r"cannot write to .*: the file system is read-only: choose another"
            ):
                attempt()


def test_a_folder_without_permission_is_one_clear_line() -> None:
    """As somebody else: nothing is forbidden to root."""
    folder = Path(tempfile.mkdtemp(prefix="no-permission-"))
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            if os.geteuid() == 0:
                os.setgid(65534), os.setuid(65534)
            try:
                new_run(folder)
            except RunFolderError as error:
                code = 0 if "no permission to write: choose another --output-dir" in str(error) else 2
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder.chmod(0o755)
    assert not list(folder.iterdir())
    folder.rmdir()
    assert code == 0


def test_a_report_that_finds_the_disk_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = made_up_run(tmp_path / "made-up", n=60)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gradientspace.report.charts.Chart.write", full)
    assert cli.main(["report", str(run.path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"gradientspace: error: cannot write to {run.path}: the disk is full")


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """The handlers of a command in the foreground: a shell's background jobs ignore Ctrl-C, and so would we."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled(number: int) -> None:
    """Send this process a signal, and wait for it to unwind the caller."""
    os.kill(os.getpid(), number)
    time.sleep(10)
    raise AssertionError(f"signal {number} did not arrive")


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_is_one_line_and_the_usual_code(monkeypatch, capsys, number: int, code: int, word: str) -> None:
    def waits(*_: object) -> None:
        signalled(number)

    monkeypatch.setattr(cli, "_doctor", waits)
    assert cli.main(["doctor"]) == code
    said = capsys.readouterr().err.strip()
    assert said == f"gradientspace: {word}; the same command continues where it stopped"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_library_that_makes_an_error_of_a_stop_is_not_believed(monkeypatch, capsys, number, code, word) -> None:
    def library(*_: object) -> None:
        try:
            signalled(number)
        except KeyboardInterrupt:
            raise RunFolderError("weights.safetensors is damaged") from None

    monkeypatch.setattr(cli, "_data", library)
    before = signal.getsignal(number)
    assert cli.main(["data", "config.yaml"]) == code
    assert capsys.readouterr().err == f"\ngradientspace: {word}; the same command continues where it stopped\n"
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_leaves_no_half_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)

    def waits(folder: Path) -> None:
        json_file(folder)
        signalled(signal.SIGTERM)

    monkeypatch.setattr(cli, "_doctor", lambda *_: run.stage("a", waits))
    assert cli.main(["doctor"]) == 143
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml", "versions.json"]


# ----------------------------------------------------------------------------- the harness and its page


@pytest.mark.parametrize("kind", ["kill", "full"])
def test_struck_at_every_write_a_toy_run_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """In a process of its own, which forks: this one's libraries have threads, and those do not survive a fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "benchmarks")))}
    command = [sys.executable, str(ROOT / "tests/toy_run.py"), kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    strikes = int(done.stdout.split()[-1])
    assert strikes > 60


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("faults")


def test_the_comparison_sees_every_difference(faults: ModuleType, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "experts").mkdir(parents=True)
        for name in ("same", "experts/other", "stages.json"):
            (tmp_path / folder / name).write_text("x" * 100)
    tally = faults.Tally()
    for folder in ("a", "b"):
        (tmp_path / folder / "stages.json").write_text(folder)
    assert faults.compare(tmp_path / "a", tmp_path / "b", tally, faults.VOLATILE) == []
    assert (tally.files_compared, tally.bytes_compared) == (2, 200)
    flip(tmp_path / "b/experts/other")
    (tmp_path / "b/left.partial").write_text("x")
    (tmp_path / "b/same").unlink()
    assert faults.compare(tmp_path / "a", tmp_path / "b", tally, faults.VOLATILE) == [
        "left.partial", "same", "experts/other",
    ]  # fmt: skip


def test_a_strike_waits_for_its_stage_or_a_later_one(faults: ModuleType) -> None:
    order = ["begin", "data", "warmup", "report"]
    at = faults.Instant("warmup", 0.5)
    assert faults._due(at, [("begin", 0.0), ("data", 1.0)], order) is None
    assert faults._due(at, [("begin", 0.0), ("data", 1.0), ("warmup", 2.0)], order) == 2.5
    assert 3.0 <= faults._due(at, [("begin", 0.0), ("report", 3.0)], order) <= 3.1


def test_the_page_holds_the_committed_numbers(faults: ModuleType) -> None:
    page = importlib.import_module("faults_page")
    text = page.PAGE.read_text()
    assert page.with_block(text, page.block(page.read())) == text, "run python benchmarks/faults_page.py"


@pytest.mark.faults
def test_a_few_of_every_kind_of_strike(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Random kills, kills and a full disk at recorded writes, both signals, damage to a file of every stage."""
    if "faults" not in pytestconfig.getoption("-m"):
        pytest.skip("takes minutes: make test-faults")
    command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--quick", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stdout + done.stderr
    campaigns = json.loads((tmp_path / "out.json").read_text())["campaigns"]
    assert campaigns.keys() == {"random", "writes", "terminate", "interrupt", "full", "damaged"}
    assert all(found["strikes"] > 0 for found in campaigns.values())


# ------------------------------------------------------------- a checkpoint within a stage that is damaged


@pytest.mark.e2e
def test_a_damaged_snapshot_of_the_pass_is_named_and_not_used(
    finished_run: Run, micro_model: Path, micro_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from gradientspace import pass_checkpoint
    from gradientspace.pipeline import run

    monkeypatch.setattr(pass_checkpoint, "INTERVAL", 0.0)
    monkeypatch.setattr(pass_checkpoint, "LARGEST_SHARE", 1e9)
    values = micro_values(micro_model, micro_mix, tmp_path)
    due = pass_checkpoint.PassCheckpoint.due

    def interrupted(self):
        if self.newest is not None:
            raise KeyboardInterrupt
        return due(self)

    with monkeypatch.context() as patch:
        patch.setattr(pass_checkpoint.PassCheckpoint, "due", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(GradientSpaceConfig.from_dict(values), until="cluster")
    flip(next((tmp_path / "micro/clustering.partial/checkpoints").glob("pass-*/clusterer.safetensors")))
    found = run(GradientSpaceConfig.from_dict(values), until="cluster")
    assert "the snapshot of the online pass is damaged" in capsys.readouterr().err
    assert hashes(found.path / "clustering") == hashes(finished_run.path / "clustering")
