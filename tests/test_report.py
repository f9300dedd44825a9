"""The report is one offline page, and text from the data is shown as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gradientspace.report import write_report
from gradientspace.run_folder import Run
from gradientspace.tables import method_rows, render

pytestmark = pytest.mark.e2e


def test_page_is_whole_and_offline(finished_run: Run) -> None:
    page = (finished_run.path / "report.html").read_text()
    for word in ("Verdict:", "gradientspace", "Clusters", "Router", "Replay", "<svg"):
        assert word in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_hostile_labels_are_text(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path, tmp_path / "copy")
    path = tmp_path / "copy/evaluation/results.json"
    path.write_text(path.read_text().replace('"count"', '"<script>alert(1)</script>"'))
    write_report(Run.open(tmp_path / "copy"))
    page = (tmp_path / "copy/report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_terminal_table_is_aligned(finished_run: Run) -> None:
    results = json.loads((finished_run.path / "evaluation/results.json").read_text())
    lines = render(*method_rows(results)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("base ")
