"""`gradientspace inspect RUN`: the samples of a run, filtered, in the terminal or exported. Reads files only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from gradientspace.damage import reading, require
from gradientspace.errors import InputError
from gradientspace.files import write_text
from gradientspace.plain_text import visible
from gradientspace.rows import FILE as ROWS_FILE
from gradientspace.rows import response_of
from gradientspace.run_folder import Run

pc: Any = pyarrow.compute  # its functions are made at import, where no type checker sees them
BOUNDARY_SHARE = 0.1
"""Where the clusterer flags no boundary: the rows with the smallest margins, this share of all."""
_MEASURES = ("cosine", "margin", "norm", "loss", "near_boundary")
_TEXTS = {"id": "string", "split": "string", "source": "string", "prompt": "string", "messages": "list<"}
_MAY_LACK = ("source", "prompt")
_SORTS = {"margin": "ascending", "cosine": "descending", "loss": "descending", "norm": "descending"}
_PROMPT, _RESPONSE = 300, 200


@dataclass(frozen=True)
class Filter:
    """Which samples: all conditions hold; None is no condition."""

    cluster: int | None = None
    boundary: bool = False
    source: str | None = None
    text: str | None = None
    """Part of the prompt, whatever its case."""
    sort: str | None = None
    """Smallest margin first, or largest cosine, loss or norm first."""


def samples_of(run: Run) -> pa.Table:
    """Every sample of `fit` with its texts, cluster and measures, in data order.

    Raises `RunFolderError` where the run has no clusters or keeps no rows yet.
    """
    folder = run.require("rows", f"run {run.path}/config.yaml")
    clustering = run.require("clustering", f"cluster {run.path}")
    with reading(run.path, "run it again from the data step"):
        rows = pq.read_table(folder / ROWS_FILE, filters=[("split", "=", "fit")])
        found = pq.read_table(clustering / "assignments.parquet")
        for table, columns in ((rows, _TEXTS), (found, {"id": "string", "cluster": "int"})):
            for name, kind in columns.items():
                require(str(table.schema.field(name).type).startswith(kind), f"column {name} is no {kind}")
                require(name in _MAY_LACK or table[name].null_count == 0, f"column {name} has empty cells")
        for name in _MEASURES:
            kinds = ("float", "double", "bool")
            if name in found.column_names:
                require(str(found.schema.field(name).type).startswith(kinds), f"column {name} is no number")
                require(found[name].null_count == 0, f"column {name} has empty cells")
    if not rows["id"].equals(found["id"]):
        raise InputError(f"{run.path}: rows and clusters are of different data; run it again from the data step")
    rows = rows.append_column("cluster", found["cluster"])
    for name in _MEASURES:
        if name in found.column_names:
            rows = rows.append_column(name, found[name])
    return rows


def select(table: pa.Table, wanted: Filter) -> pa.Table:
    """The rows that pass the filter, sorted. Raises `InputError` for a cluster, source or measure that is not there."""
    if wanted.boundary:
        table = table.filter(_boundary(table))
    if wanted.cluster is not None:
        known = sorted(set(pc.unique(table["cluster"]).to_pylist()))
        if wanted.cluster not in known and not wanted.boundary:
            raise InputError(f"cluster {wanted.cluster} is not in this run: it has {', '.join(map(str, known))}")
        table = table.filter(pc.equal(table["cluster"], wanted.cluster))
    if wanted.source is not None:
        names = sorted({s or "" for s in pc.unique(table["source"]).to_pylist()})
        if wanted.source not in names and len(table):
            raise InputError(f"source {wanted.source!r} is not here: there are {', '.join(names[:12])}")
        table = table.filter(pc.equal(pc.fill_null(table["source"], ""), wanted.source))
    if wanted.text:
        table = table.filter(pc.match_substring(table["prompt"], wanted.text, ignore_case=True))
    sort = wanted.sort or ("margin" if wanted.boundary else None)
    if sort is None:
        return table
    _require(table, sort)
    return table.sort_by([(sort, _SORTS[sort])])


def _boundary(table: pa.Table) -> pa.ChunkedArray:
    if "near_boundary" in table.column_names:
        return table["near_boundary"]
    _require(table, "margin")
    limit = pc.quantile(table["margin"], q=BOUNDARY_SHARE)[0]
    return pc.less_equal(pc.cast(table["margin"], pa.float64()), limit)


def _require(table: pa.Table, measure: str) -> None:
    if measure not in table.column_names:
        raise InputError(f"this run's clusters have no {measure}: they were not made of gradients")


def render(table: pa.Table, limit: int) -> str:
    """The first `limit` samples as text, one paragraph each, and how many there are."""
    shown = table.slice(0, limit).to_pylist()
    paragraphs = [_paragraph(row) for row in shown]
    total = f"{len(table):,} samples" + (f", the first {len(shown)} shown" if len(shown) < len(table) else "")
    return "\n\n".join([*paragraphs, total])


def _paragraph(row: dict[str, Any]) -> str:
    measures = ", ".join(f"{name} {row[name]:+.3f}" for name in ("cosine", "margin", "loss") if name in row)
    labels = [f"cluster {row['cluster']}", *([visible(row["source"], 40)] if row["source"] else []), measures]
    head = f"{visible(row['id'], 60)}  ({'; '.join(label for label in labels if label)})"
    prompt, response = visible(row["prompt"] or "", _PROMPT), visible(response_of(row["messages"]), _RESPONSE)
    return "\n".join([head, *(f"  > {line}" for line in prompt.splitlines()),
                      *(f"  < {line}" for line in response.splitlines())])  # fmt: skip


def export(table: pa.Table, path: Path) -> None:
    """Write the samples, whole, as .jsonl, as .parquet, or into a folder that `datasets.load_from_disk` opens."""
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
    elif path.suffix == ".parquet":
        partial = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, partial)
        partial.replace(path)
    elif not path.suffix:
        _export_dataset(table, path)
    else:
        raise InputError(f"cannot export to {path}: give a .jsonl or .parquet file, or a new folder for datasets")


def _export_dataset(table: pa.Table, folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{folder} exists already: give a new folder")
    try:
        from datasets import Dataset
    except ImportError as error:
        raise InputError("a datasets folder needs the package: pip install 'gradientspace[hub]'") from error
    Dataset(table).save_to_disk(str(folder))
