"""The run's files -> one offline HTML page. Reads JSON and Parquet only; knows nothing of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from gradientspace.run_folder import Run, write_text
from gradientspace.tables import method_rows

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.verdict { font-size: 1.15rem; padding: 1rem; border-left: 4px solid #2a7; background: #2a71; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .75rem; }
figure { margin: 1rem 0; }
"""
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
_EXAMPLES = 3
_POINTS = 1500


def write_report(run: Run) -> None:
    """Write `report.html` from what the run folder holds."""
    results = json.loads((run.require("evaluation", f"eval {run.path}") / "results.json").read_text())
    accounting = json.loads((run.path / "data/accounting.json").read_text())
    assignments = pq.read_table(run.path / "clustering/assignments.parquet")
    parts = [
        f"<h1>GradientSpace: {escape(run.path.name)}</h1>",
        f'<p class="verdict">{"<br>".join(escape(line) for line in results["verdict"])}</p>',
        "<h2>Methods</h2>",
        f"<p>Evaluated on {escape(results['split'])}. Loss is the mean of each sample's own mean "
        "completion-token cross-entropy, in nats.</p>",
        _table(*method_rows(results)),
        "<h2>Clusters</h2>",
        _clusters(results),
        _gradient_map(assignments),
        "<h2>Router</h2>",
        _table(("", "value"), [(k.replace("_", " "), f"{v:.4f}") for k, v in results["router"].items()]),
        "<h2>Rows of the data</h2>",
        f"<pre>{escape(json.dumps(_totals(accounting), indent=1))}</pre>",
        "<h2>Cost of each stage</h2>",
        _costs(run),
        "<h2>Replay</h2>",
        f"<pre>gradientspace run config.yaml\n\n{escape((run.path / 'config.yaml').read_text())}</pre>",
    ]
    title = escape(run.path.name)
    write_text(
        run.path / "report.html",
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style><main>{''.join(parts)}</main></html>\n",
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cells(values: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(v))}</{tag}>" for v in values) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>"


def _clusters(results: dict[str, Any]) -> str:
    clustering = results["clustering"]
    agreements = [
        (label, f"{v['ari']:.3f}", f"{v['nmi']:.3f}", f"{v['purity']:.3f}")
        for label, v in clustering["agreement"].items()
    ]
    domains = list(results["experts"]["loss_by_domain"].items())
    experts = [(f"expert {k}", size, *(f"{losses[k]:.3f}" for _, losses in domains))
               for k, size in enumerate(clustering["sizes"])]  # fmt: skip
    return (
        _table(("", "samples", *(f"loss on {d}" for d, _ in domains)), experts)
        + "<p>Agreement of the clusters with labels that were never trained on:</p>"
        + _table(("label", "adjusted Rand", "NMI", "purity"), agreements)
    )


def _gradient_map(assignments: Any) -> str:
    """The first two gradient coordinates of a sample of rows, coloured by cluster, as inline SVG."""
    if "coordinates" not in assignments.column_names:
        return ""
    points = np.stack(assignments["coordinates"].to_numpy())[:, :2]
    clusters = assignments["cluster"].to_numpy()
    if points.shape[1] < 2:
        return ""
    shown = np.random.default_rng(0).permutation(len(points))[:_POINTS]
    low, high = points[shown].min(axis=0), points[shown].max(axis=0)
    xy = (points[shown] - low) / np.where(high > low, high - low, 1) * (580, 380) + 10
    dots = "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="2.5" fill="{_COLOURS[k % len(_COLOURS)]}" fill-opacity=".6"/>'
        for (x, y), k in zip(xy, clusters[shown], strict=True)
    )
    return (
        '<figure><svg viewBox="0 0 600 400" role="img" aria-label="Gradient map: first two coordinates, '
        f'coloured by cluster">{dots}</svg><figcaption>First two coordinates of {len(shown)} gradients in the '
        "dominant subspace, coloured by cluster.</figcaption></figure>"
    )


def _totals(accounting: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in accounting.items() if isinstance(v, int | float | str | dict)}


def _costs(run: Run) -> str:
    costs = json.loads((run.path / "stages.json").read_text())
    rows = [(name, f"{c['seconds']:.1f}", f"{c['peak_memory_bytes'] / 2**20:.0f}") for name, c in costs.items()]
    return _table(("stage", "seconds", "peak MB"), rows)
