"""The report in a real browser with the network off. `make test-browser` installs what this needs and runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import made_up_run

from gradientspace.report import write_comparison, write_report

pytestmark = pytest.mark.browser
BROWSER = Path(__file__).parent / "browser"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module", autouse=True)
def _needs_a_browser() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (BROWSER / "node_modules").is_dir():
        pytest.skip("no browser installed: run `make test-browser` (npm install in tests/browser)")


def opened(page: Path) -> dict[str, Any]:
    command = ["node", "open.mjs", str(page)]
    done = subprocess.run(command, cwd=BROWSER, capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(seen: dict[str, Any], page: Path) -> None:
    """No message, no request, no sideways scrolling, no serious fault; light and dark differ."""
    assert seen["messages"] == []
    assert set(seen["requests"]) == {f"file://{page}"}
    assert [fault for fault in seen["faults"] if fault["impact"] in SERIOUS] == []
    assert max(seen["overflow"].values()) <= 0
    assert seen["background"]["light"] != seen["background"]["dark"]
    paper = seen["paper"]
    assert paper["pages"] >= 1
    assert paper["overflow"] <= 0
    assert paper["background"] == "rgb(255, 255, 255)", "dark on screen, yet white on paper"
    assert paper["folded"] == 0, "everything is unfolded on paper"
    assert paper["foldedAgain"], "and folded again on the screen"
    assert paper["undrawn"] == []
    assert not paper["screenOnly"], "what only answers to a pointer is not printed"
    assert seen["figures"]
    for figure in seen["figures"]:
        assert figure["shapes"] > 5, figure
        assert figure["large"], figure


def test_the_report_draws_and_answers(tmp_path: Path) -> None:
    page = write_report(made_up_run(tmp_path / "run", n=600, k=4))
    seen = opened(page)
    check(seen, page)
    controls = seen["controls"]
    assert controls["painted"] > 1000
    for said in (controls["hovered"], controls["keyed"]):
        assert "cluster" in said
        assert "number" in said, "the sample's own text"
    assert controls["drawn"] == "loss"
    assert controls["recoloured"]
    assert controls["alone"]
    up = [float(value) for value in seen["sorting"]["up"]]
    assert up == sorted(up)
    assert seen["sorting"]["down"] == seen["sorting"]["up"][::-1]


def test_hostile_text_runs_nothing(tmp_path: Path) -> None:
    hostile = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> \u202egpj.exe"
    page = write_report(made_up_run(tmp_path / "hostile", hostile=hostile))
    seen = opened(page)
    check(seen, page)
    assert not seen["hacked"]
    assert "<script>" in seen["controls"]["hovered"] + seen["controls"]["keyed"]


def test_a_hundred_thousand_samples_open_in_two_seconds(tmp_path: Path) -> None:
    page = write_report(made_up_run(tmp_path / "large", n=100_000, k=16))
    assert page.stat().st_size < 5_000_000
    seen = opened(page)
    check(seen, page)
    assert max(seen["milliseconds"]) < 2_000


def test_the_comparison_is_as_sound(tmp_path: Path) -> None:
    runs = [made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b", k=4, seed=1)]
    page = write_comparison(runs, tmp_path / "compare.html")
    seen = opened(page)
    check(seen, page)
    assert seen["sorting"]["down"] == seen["sorting"]["up"][::-1]
