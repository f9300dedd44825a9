"""The report: one offline page from files only, every figure beside it, text from data shown as text."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fixtures import made_up_run

from gradientspace.files import write_json
from gradientspace.report import write_comparison, write_report
from gradientspace.run_folder import Run

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror=hacked()> \u202egpj.exe \x1b[31m {{ 7 * 7 }} $x_1$"
)
SECTIONS = ["methods", "clusters", "map", "k", "conflict", "data", "training", "router", "experts", "cost", "replay"]


class Page(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.get_starttag_text():
            self.scripts.append(data)
        self.text += data

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = made_up_run(tmp_path_factory.mktemp("runs") / "made-up")
    write_report(run)
    return run


def test_sections_come_in_the_order_that_a_reader_needs(finished: Run) -> None:
    page = Page(finished.path / "report.html")
    assert page.sections == SECTIONS
    assert page.text.index("Split into 3") < page.text.index("Every method, on the same prompts")
    assert "95 % interval" in page.text


def test_the_page_needs_nothing_but_itself(finished: Run) -> None:
    page = Page(finished.path / "report.html")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in page.text


def test_every_figure_lies_beside_the_page_in_three_forms(finished: Run) -> None:
    shown = {a["data-figure"] for tag, a in Page(finished.path / "report.html").tags if tag == "figure"}
    folder = finished.path / "figures"
    assert {p.stem for p in folder.iterdir()} == shown
    assert len(shown) >= 10
    for name in shown:
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.reader((folder / f"{name}.csv").read_text().splitlines()))
        assert len(rows) > 1
        assert len({len(row) for row in rows}) == 1


def test_remaking_gives_the_same_bytes(finished: Run) -> None:
    files = [finished.path / "report.html", *sorted((finished.path / "figures").iterdir())]
    before = [file.read_bytes() for file in files]
    write_report(finished)
    assert [file.read_bytes() for file in files] == before


def test_the_report_never_loads_torch(finished: Run) -> None:
    code = (
        "import sys; from gradientspace.cli import main; main(['report', sys.argv[1]])\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(finished.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_a_run_does_not_have_is_absent(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "early", evaluated=False)
    shutil.rmtree(run.path / "rows")
    (run.path / "clustering/validation.parquet").unlink()
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["stages"].pop("rows")  # as a run has it that was made before there were such files
    manifest["stages"]["clustering"]["files"].pop("validation.parquet")
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    page = Page(write_report(run))
    assert page.sections == ["clusters", "map", "k", "data", "training", "cost", "replay"]
    assert "No verdict yet" in page.text
    assert "Central examples" not in page.text
    assert "nan" not in page.text.lower().split()


def test_a_run_with_data_only_has_a_page(tmp_path: Path, finished: Run) -> None:
    shutil.copytree(finished.path, tmp_path / "begun")
    run = Run.open(tmp_path / "begun")
    run.forget("clustering", "evaluation", "shared", "single", "experts", "warmup", "rows")
    assert Page(write_report(run)).sections == ["data", "cost", "replay"]


def test_hostile_text_is_text(tmp_path: Path) -> None:
    page = Page(write_report(made_up_run(tmp_path / "hostile", hostile=HOSTILE)))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [attributes for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert "<script>window.hacked = 1</script>" in page.text
    assert "[U+202E RIGHT-TO-LEFT OVERRIDE]gpj.exe" in page.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "$x_1$" in page.text


def test_a_huge_text_is_cut_with_a_note(tmp_path: Path) -> None:
    path = write_report(made_up_run(tmp_path / "huge", n=120, hostile="word " * 20_000))
    assert path.stat().st_size < 2_000_000
    assert re.search(r"… \(\+\d\d,\d{3} characters\)", path.read_text())


def test_only_our_script_may_run(finished: Run) -> None:
    page = (finished.path / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy.group(1)
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy.group(1))


def test_a_large_run_is_a_small_page(tmp_path: Path) -> None:
    path = write_report(made_up_run(tmp_path / "large", n=20_000, k=16))
    assert path.stat().st_size < 5_000_000
    data = json.loads(re.search(r'id="map-data">(.*?)</script>', path.read_text()).group(1))  # type: ignore[union-attr]
    assert 3_900 < len(data["prompts"]) < 4_700
    assert len(data["colours"]) == 16


def test_runs_side_by_side(tmp_path: Path, finished: Run) -> None:
    other = made_up_run(tmp_path / "other", k=4, seed=1)
    early = made_up_run(tmp_path / "early", evaluated=False)
    page = Page(write_comparison([finished, other, early], tmp_path / "compare.html"))
    for words in ("Split into 3", "Split into 4", "No verdict yet", "clustering.n_clusters", "On the same prompts"):
        assert words in page.text, words


@pytest.mark.e2e
def test_a_real_run_has_every_section(finished_run: Run) -> None:
    assert Page(write_report(finished_run)).sections == SECTIONS


def test_a_sweep_beside_the_run_is_shown(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "swept", evaluated=False)
    stability = {"mean": 0.9, "low": 0.8, "high": 1.0, "n_clusterings": 5}
    rows = [{"n_clusters": k, "between": 0.1 * k, "stability": stability, "sizes": [1]} for k in (2, 3, 4)]
    write_json(run.path / "sweep.json", {"schema": 1, "rows": rows})
    page = Page(write_report(run))
    assert "Stability over K" in page.text
    assert (run.path / "figures/sweep.csv").read_text().splitlines()[1] == "2,0.2,0.9,0.8,1.0"
