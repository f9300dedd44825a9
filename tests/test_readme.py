"""What the README shows is what happens: its commands, its Python. Its numbers: test_pages.py."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from gradientspace.cli import _parser
from gradientspace.run_folder import Run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_command_parses() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("gradientspace")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert _parser().parse_args(words).command == words[0]
        for word in words:
            assert not word.endswith(".yaml") or (ROOT / word).is_file(), word


def run_the_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the README's Python prints when run in `folder`."""
    monkeypatch.chdir(folder)
    (code,) = blocks("python")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


@pytest.mark.e2e
def test_the_python_runs(finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the micro run in the demo's place: every line runs, and what is printed has the shape that is shown.

    Not the very words: another processor sums in another order, and its demo may number the experts otherwise.
    """
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(finished_run.path)
    printed = run_the_python(tmp_path, monkeypatch)
    (shown,) = blocks("text")
    shape = re.compile(r"expert \d, probability [\d.]+: .*")
    for text in (printed, shown):
        assert len(text.splitlines()) == 2
        assert all(shape.fullmatch(line) for line in text.splitlines())


def test_the_map_of_the_house_has_every_room() -> None:
    source = ROOT / "src/gradientspace"
    rooms = [p.name for p in source.glob("*.py") if not p.name.startswith("__")]
    rooms += [f"{p.parent.name}/" for p in source.glob("*/__init__.py")]
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert [room for room in rooms if f"{room}`" not in table] == []
