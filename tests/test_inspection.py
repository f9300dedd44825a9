"""Samples of a run in the terminal and exported: filters, order, hostile text, kind errors."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from report_fixtures import made_up_run

from gradientspace.cli import main
from gradientspace.errors import InputError
from gradientspace.inspection import Filter, export, samples_of, select
from gradientspace.run_folder import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_up_run(tmp_path_factory.mktemp("runs") / "run", hostile="\x1b[2J\u202egpj.exe", evaluated=False)


def test_filters_hold_together(run: Run) -> None:
    everything = samples_of(run)
    found = select(everything, Filter(cluster=2, boundary=True)).to_pylist()
    expected = [r for r in everything.to_pylist() if r["cluster"] == 2 and r["near_boundary"]]
    assert {r["id"] for r in found} == {r["id"] for r in expected}
    assert found
    margins = [r["margin"] for r in found]
    assert margins == sorted(margins)


def test_without_flags_the_boundary_is_the_smallest_margins(run: Run) -> None:
    table = samples_of(run).drop_columns(["near_boundary"])
    found = select(table, Filter(boundary=True))
    assert len(found) == pytest.approx(len(table) / 10, abs=1)
    assert max(found["margin"].to_pylist()) <= sorted(table["margin"].to_pylist())[len(found)]


def test_search_and_source(run: Run) -> None:
    table = samples_of(run)
    source = table["source"][0].as_py()
    found = select(table, Filter(source=source, text="NUMBER 1"))
    assert found["source"].unique().to_pylist() == [source]
    assert all("number 1" in p.lower() for p in found["prompt"].to_pylist())


def test_the_terminal_is_safe_from_the_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run.path), "--cluster", "1", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[U+202E RIGHT-TO-LEFT OVERRIDE]gpj.exe" in out
    assert "the first 2 shown" in out


@pytest.mark.parametrize("name", ["found.jsonl", "found.parquet"])
def test_exports_hold_the_whole_samples(run: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert main(["inspect", str(run.path), "--cluster", "0", "--export", str(path)]) == 0
    if name.endswith("jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pq.read_table(path).to_pylist()
    expected = select(samples_of(run), Filter(cluster=0)).to_pylist()
    assert rows == expected
    assert rows[0]["messages"][1]["role"] == "assistant"


def test_a_datasets_folder_opens(run: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    found = select(samples_of(run), Filter(cluster=1))
    export(found, tmp_path / "folder")
    assert datasets.load_from_disk(str(tmp_path / "folder"))["id"][:] == found["id"].to_pylist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "9"], "it has 0, 1, 2"),
        (["--source", "nowhere"], "source 'nowhere' is not here"),
        (["--export", "x.csv"], ".jsonl or .parquet"),
    ],
)
def test_a_wrong_wish_is_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["inspect", str(run.path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_sorting_by_what_is_not_there_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match="no loss"):
        select(samples_of(run).drop_columns(["loss"]), Filter(sort="loss"))
