"""The page: everything there is to say of a run, put into the template, which escapes whatever is not ours."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from gradientspace import __version__
from gradientspace.conflict import negative_share
from gradientspace.report import figures, sections
from gradientspace.report.charts import Chart
from gradientspace.report.clusters import clusters_of
from gradientspace.report.gradient_map import gradient_map, packed, static_chart
from gradientspace.report.record import RunRecord
from gradientspace.report.sections import Table

FIGURES = (
    figures.differences,
    figures.cluster_sources,
    figures.spectrum,
    figures.sweep,
    figures.source_conflict,
    figures.cluster_conflict,
    figures.training_curves,
    figures.confusion,
    figures.calibration,
    figures.coverage,
    figures.expert_domains,
    figures.stage_costs,
)
CONTENTS = {
    "methods": "Methods", "clusters": "Clusters", "map": "Gradient map", "k": "K", "conflict": "Conflict",
    "data": "Data", "training": "Training", "router": "Router", "experts": "Experts", "cost": "Cost",
    "replay": "Replay",
}  # fmt: skip


def render(record: RunRecord) -> tuple[str, list[Chart]]:
    """The page of a run and the figures on it."""
    drawn = {chart.name: chart for make in FIGURES if (chart := make(record)) is not None}
    values = _words(record)
    found = gradient_map(record)
    if found is not None:
        drawn["gradient-map"] = static_chart(record, found)
        data = packed(record, found, [c.title for c in values["clusters"]])
        assert record.assignments is not None
        directions = len(record.assignments["coordinates"][0])
        values |= {"map_data": data, "map_json": _json_for_html(data), "directions": directions}
    if record.gram is not None:
        values["negative"] = negative_share(record.gram[1])
    shown = _shown(values, drawn)
    contents = [(id, title) for id, title in CONTENTS.items() if id in shown]
    page = fill("page.html", {"charts": drawn, "shown": shown, "contents": contents, **values})
    return page, list(drawn.values())


def _shown(values: dict[str, Any], drawn: dict[str, Chart]) -> set[str]:
    """The sections that the run has something for."""
    there = {
        "methods": values["methods"],
        "clusters": values["clusters"],
        "map": "gradient-map" in drawn,
        "k": values["k_sentences"],
        "conflict": "conflict-sources" in drawn or "conflict-clusters" in drawn,
        "data": values["accounting_tables"],
        "training": "training" in drawn,
        "router": "router-calibration" in drawn or "router-confusion" in drawn,
        "experts": "expert-domains" in drawn,
        "cost": values["costs"] or values["method_costs"],
        "replay": True,
    }
    return {id for id, value in there.items() if value}


def _words(record: RunRecord) -> dict[str, Any]:
    headline, sentences = sections.verdict(record)
    k, data = sections.choice_of_k(record), sections.accounting(record)
    config, config_hash, stages, versions = sections.replay(record)
    return {
        "page_title": f"{record.name}: {headline}",
        "name": record.name,
        "headline": headline,
        "sentences": sentences,
        "numbers": sections.key_numbers(record),
        "methods": sections.method_tables(record),
        "clusters": clusters_of(record),
        "agreement": sections.agreement(record),
        "k_sentences": k and k[0],
        "criteria": k and k[1],
        "accounting_sentences": data and data[0],
        "accounting_tables": data and data[1],
        "router": sections.router_sentences(record),
        "costs": sections.costs(record),
        "method_costs": sections.training_cost(record),
        "config": config,
        "config_path": f"{record.name}/config.yaml",
        "config_hash": config_hash,
        "stages": Table("SHA-256 of every stage's files, shortened", ["stage", "hash"], stages),
        "versions": versions,
    }


def fill(template: str, values: dict[str, Any]) -> str:
    """Render a template of this package with autoescape, our style and our script.

    The content security policy names the script by its hash: whatever a hostile text managed to put on the page,
    no other script would run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    class Absent(StrictUndefined):
        """A value that a run does not have is false; using it otherwise is an error of ours."""

        def __bool__(self) -> bool:
            return False

    environment = Environment(
        loader=PackageLoader("gradientspace.report"), autoescape=True, undefined=Absent,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    folder = files("gradientspace.report") / "templates"
    script, style = ((folder / name).read_text("utf-8") for name in ("page.js", "page.css"))
    own = {
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": style,
        "version": __version__,
    }
    return environment.get_template(template).render(**own, **values)


def _json_for_html(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
