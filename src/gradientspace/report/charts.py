"""Figures as matplotlib draws them, in one calm style: for the page, and as SVG, PNG and CSV beside it.

The page's copy takes its colours from CSS variables, so it follows light and dark; the files have the light ones.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradientspace.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, SURFACE, ACCENT = "#1b1c1f", "#5f636c", "#dcdfe4", "#fefeff", "#2a6fb0"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", ACCENT: "--accent"}
CLUSTER_COLOURS = (
    "#3b76af", "#d9603b", "#3a8f5c", "#a8479b", "#b58900", "#11939a", "#c23b5a", "#7a68c9",
    "#6f8f1e", "#8c6239", "#4aa3d0", "#e07b91", "#7d8590", "#2f9e89", "#9a5fd0", "#c77d28",
)  # fmt: skip
"""Mid tones that stand out on white and on near-black alike; a cluster's number always stands beside its colour."""
WIDTH = 3.6
"""Inches. At this size 8-point text reads well on a phone and in a two-column page."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a source's name is a dollar
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "lines.linewidth": 1.4,
}
_PNG_DPI = 200


@dataclass(frozen=True)
class Chart:
    """One figure: its page copy, its files' bytes, and its numbers as a table."""

    name: str
    """A file's stem, chosen by us and never taken from data."""
    title: str
    description: str
    """What a reader who cannot see it should know."""
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """The SVG for the page: no fixed size, ids of its own, colours from the page."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*" ', r"\1 ", body, count=1)
        body = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", body, count=1)
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(r'\bid="', f'id="{self.name}-', body)
        body = re.sub(r"url\(#", f"url(#{self.name}-", body)
        body = re.sub(r'(xlink:href|href)="#', rf'\1="#{self.name}-', body)
        body = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", body)
        for colour, variable in _VARIABLES.items():
            body = body.replace(colour, f"var({variable})")
        return body.replace("<svg", '<svg aria-hidden="true"', 1)

    def write(self, folder: Path) -> None:
        """NAME.svg, NAME.png and NAME.csv."""
        write_text(folder / f"{self.name}.svg", self.svg)
        write_bytes(folder / f"{self.name}.png", self.png)
        table = io.StringIO()
        csv.writer(table).writerows([self.head, *([_guarded(cell) for cell in row] for row in self.rows)])
        write_text(folder / f"{self.name}.csv", table.getvalue())


def draw(
    name: str,
    title: str,
    description: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    paint: Callable[[Any], None],
    *,
    height: float = 2.4,
    columns: int = 1,
) -> Chart:
    """Let `paint` draw on one axes (or a list of `columns` axes) and keep the result in every form."""
    import matplotlib
    from matplotlib.figure import Figure

    # Bytes must not change from one making to the next: ids come from the salt, files carry no date.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The page shows any script in the reader's fonts; the PNG has a box where matplotlib's font has none.
        warnings.filterwarnings("ignore", message=".*Glyph.*missing.*")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(1, columns)
        paint(list(axes) if columns > 1 else axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
    return Chart(name, title, description, head, rows, svg.getvalue(), png.getvalue())


def heatmap(
    axes: Axes,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str,
    low: float,
    high: float,
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Cells (r, c) coloured between `low` and `high`, with their numbers where they fit."""
    import numpy as np
    from matplotlib import colormaps

    values = np.asarray(values, dtype=float)
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if _short(columns) else 40, ha=_anchor(columns))
    axes.set_yticks(range(len(rows)), rows)
    if texts is None or len(columns) > 12:
        return
    span = (high - low) or 1.0
    # Long names leave the cells little room.
    crowded = len(columns) > 8 or (len(columns) > 5 and max(map(len, rows)) > 10)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = colormaps[colours]((value - low) / span)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            colour = "#ffffff" if dark else "#16181c"
            axes.text(j, i, str(texts[i][j]), ha="center", va="center", fontsize=5.5 if crowded else 7, color=colour)


def _short(labels: Sequence[str]) -> bool:
    return sum(len(label) + 2 for label in labels) < 44


def _anchor(labels: Sequence[str]) -> str:
    return "center" if _short(labels) else "right"


def _guarded(cell: Any) -> Any:
    """A text that a spreadsheet would run as a formula gets a leading apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") else cell


def bar_axes(axes: Axes) -> None:
    """Axes of horizontal bars: no frame, grid across the bars only, first bar on top."""
    axes.grid(False, axis="y")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.invert_yaxis()


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at its ticks, since mathematics is not typeset."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [step * 10.0**e for e in range(-9, 9) for step in steps if low <= step * 10.0**e <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def colour_of(k: int) -> str:
    return CLUSTER_COLOURS[k % len(CLUSTER_COLOURS)]


def end_labels(axes: Axes, lines: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name (x, y, text, colour) at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    room = (high - low) / 14
    place = float("-inf")
    for x, y, text, colour in sorted(lines, key=lambda line: line[1]):
        place = max(y, place + room)
        axes.annotate(
            text, (x, place), xytext=(4, 0), textcoords="offset points", va="center", color=colour, fontsize=7
        )
