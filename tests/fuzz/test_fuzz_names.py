"""Names that come with data, a config or a run, and read like paths: they stay names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import alpaca_rows, byte_tokenizer
from harness import case, search
from hypothesis import given
from hypothesis import strategies as st

from gradientspace.config import GradientSpaceConfig
from gradientspace.data import load
from gradientspace.errors import ConfigError
from gradientspace.inspection import Filter, render, select
from gradientspace.rows import FILE, write_rows
from gradientspace.run_folder import Run

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("in_tmp_path")]
_NUMBERS = itertools.count()
TOKENIZER = byte_tokenizer()

NAME = st.one_of(
    st.sampled_from(
        [
            "../../x",
            "/etc/passwd",
            "..",
            ".",
            "a/b",
            "a\\b",
            "C:\\x",
            "x\0y",
            "~/x",
            "$(touch owned)",
            "`id`",
            "; ls #",
            "con",
            "\n",
            "a\nb",
            "\u202egnp.exe",
            "x" * 300,
            "-rf",
            "--help",
            "<script>alert(1)</script>",
            "é",
            "\ud800",
        ]
    ),
    st.text(max_size=20),
)


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@search("names", 0.6)
@given(names=st.fixed_dictionaries({"source": NAME, "domain": NAME, "id": NAME}), own=NAME | st.none())
def test_names_of_rows_never_become_paths(tmp_path: Path, names: dict[str, str], own: str | None) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / str(next(_NUMBERS))
    folder.mkdir()
    rows = [{**row, **names, "id": f"{names['id']}{i}"} for i, row in enumerate(alpaca_rows(8))]
    (folder / "mix.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = tree(tmp_path)
    with case("names", folder):
        source = {"path": str(folder / "mix.jsonl"), "name": own}
        config = GradientSpaceConfig.from_dict({"data": {"train": [source], "n_validation": 4}}).data
        write_rows(folder / FILE, load(config, TOKENIZER, 0))
        table = pq.read_table(folder / FILE)
        table = table.append_column("cluster", [[0] * len(table)])
        for source in {s or "" for s in table["source"].to_pylist()}:
            assert "\x1b" not in render(select(table, Filter(cluster=0, source=source)), 3)
    assert tree(tmp_path) - before <= {folder / FILE}


@search("names", 0.4)
@given(name=NAME)
def test_the_name_of_a_run_is_one_folder_or_refused(tmp_path: Path, name: str) -> None:
    output = tmp_path / f"runs-{next(_NUMBERS)}"
    values: dict[str, Any] = {
        "name": name,
        "output_dir": str(output),
        "model": {"model_name_or_path": "m"},
        "data": {"train": [{"path": "x.jsonl"}]},
    }
    with case("names", output):
        run = Run.create(GradientSpaceConfig.from_dict(values).validate())
        assert run.path.resolve().parent == output.resolve()


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "..", ".", "a\\b", "a\nb", "x" * 300, " ", "a\0"])
def test_a_run_named_like_a_path_is_refused(name: str) -> None:
    values = {"name": name, "model": {"model_name_or_path": "m"}, "data": {"train": [{"path": "x.jsonl"}]}}
    with pytest.raises(ConfigError, match="folder"):
        GradientSpaceConfig.from_dict(values).validate()
