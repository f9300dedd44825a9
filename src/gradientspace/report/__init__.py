"""The run's files -> one offline HTML page, and every figure beside it. Reads files only; knows nothing of torch.

`record` reads the run folder, `figures` and `gradient_map` draw, `clusters` and `sections` say things in words and
tables, `templates/page.html` puts them together; `comparing` lays runs side by side. What a run does not have is
absent.
"""

from __future__ import annotations

from pathlib import Path

from gradientspace.damage import reading
from gradientspace.files import explain_os_errors, write_text
from gradientspace.report.comparing import write_comparison
from gradientspace.report.page import render
from gradientspace.report.record import RunRecord
from gradientspace.run_folder import Run

__all__ = ["write_comparison", "write_report"]

FIGURES = "figures"


def write_report(run: Run) -> Path:
    """Write `report.html` and `figures/` from what the run folder holds so far. Returns the page's path."""
    with reading(run.path, "run it again from the step that made it"):
        page, charts = render(RunRecord.read(run))
    folder = run.path / FIGURES
    with explain_os_errors(run.path):
        if folder.is_symlink():
            folder.unlink()  # never write where it points to
        folder.mkdir(exist_ok=True)
        for chart in charts:
            chart.write(folder)
        write_text(run.path / "report.html", page)
    return run.path / "report.html"
