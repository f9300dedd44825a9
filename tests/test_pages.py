"""README and docs hold what the committed results files hold, not what somebody typed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CODE = re.compile(r"^(```.*?^```|(?: {4,}).*?)$|`[^`]*`", flags=re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d+\.\d+|\d[\d,]* ?(?:%|x\b|ms\b|s\b|MB\b|MiB\b|GB\b|tokens/s|nats\b)")
NOT_MEASURED = {
    "README.md": {"2512.06678", "3.11", "2.0"},
    "docs/baselines.md": {"1 %", "2402.04333", "2502.00089"},
    # Settings: where a cluster counts as stable, and the cosines of rows of the table further down.
    "docs/clustering.md": {"0.8", "0.1", "0.05", "0.02"},
    "docs/diagnosis.md": {"5 %"},
    "docs/export.md": {"0.32"},
    "docs/results.md": {"95 %"},
    "docs/serving.md": {"127.0", "0.1"},
    "docs/training.md": {"1 %"},
}
"""Versions, papers, defaults and settings that a page may name outside its measured parts."""
WHOLE = {"docs/scaling.md"}
"""Written from beginning to end by a script, and compared with it by a test of its own."""


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pages")


def test_every_measured_part_is_what_the_results_files_say(pages: ModuleType) -> None:
    for page in pages.PAGES:
        text = page.read_text(encoding="utf-8")
        assert pages.filled(text) == text, f"{page.name}: run python benchmarks/pages.py"


def test_every_part_has_its_page(pages: ModuleType) -> None:
    marked = [found["name"] for page in pages.PAGES for found in pages.MARKED.finditer(page.read_text())]
    assert sorted(marked) == sorted(pages.PARTS)


def test_no_measurement_is_typed(pages: ModuleType) -> None:
    """A number with a decimal point or a unit, outside code and measured parts, is a setting named here or a fault."""
    for page in pages.PAGES:
        name = page.relative_to(pages.ROOT).as_posix()
        if page == pages.HISTORY or name in WHOLE:
            continue
        found = set(MEASURED.findall(CODE.sub("", pages.typed(page.read_text()))))
        assert found <= NOT_MEASURED.get(name, set()), f"{name}: mark the part and let benchmarks/pages.py write it"


def test_the_history_quotes_the_results_files_rightly(pages: ModuleType) -> None:
    assert pages.gone() == []


def test_a_number_that_somebody_changed_is_seen(pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = next(page for page in pages.PAGES if page.name == "training.md")
    text = page.read_text()
    changed = text.replace("times in all", "times or so")
    assert changed != text
    assert pages.filled(changed) == text
    monkeypatch.setattr(pages.quotes, "sentences", lambda: ["an entry that nobody wrote"])
    assert pages.gone() == ["an entry that nobody wrote"]


def test_only_a_check_fails_where_the_history_quotes_an_older_table(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages.quotes, "sentences", lambda: ["an entry that nobody wrote"])
    monkeypatch.setattr(pages.clustering_page, "draw", lambda: None)
    for arguments, code in (["--check"], 1), ([], 0):
        monkeypatch.setattr("sys.argv", ["pages.py", *arguments])
        assert pages.main() == code
        assert "an entry that nobody wrote" in capsys.readouterr().out
