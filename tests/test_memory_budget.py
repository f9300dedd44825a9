"""A run whose validation gradients do not fit the budget makes them again, block by block, with the same outcome."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import micro_values

from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import ConfigError
from gradientspace.pipeline import run

pytestmark = pytest.mark.e2e


@pytest.fixture
def values(micro_model: Path, micro_mix: Path, tmp_path: Path) -> dict:
    values = micro_values(micro_model, micro_mix, tmp_path)
    values["data"]["train"][0]["limit"] = 150
    values["data"]["n_validation"] = 110
    values["clustering"] |= {"target": "plain", "update": "mean"}
    return values


def test_block_by_block_gives_the_same_clusters(values: dict, capsys) -> None:
    values["gradients"] = {"max_tokens_per_batch": 64}  # few rows in a batch, so the validation gradients weigh most
    whole = run(GradientSpaceConfig.from_dict(values), until="cluster").path / "clustering"
    values["clustering"]["memory_budget_gib"] = 0.001
    blocks = run(GradientSpaceConfig.from_dict(values | {"name": "blocks"}), until="cluster").path / "clustering"
    assert "passes over them, block by block" in capsys.readouterr().err
    one, two = (pq.read_table(folder / "assignments.parquet") for folder in (whole, blocks))
    assert one["cluster"].to_pylist() == two["cluster"].to_pylist()
    coordinates = [np.stack(table["coordinates"].to_numpy()) for table in (one, two)]
    assert np.allclose(*coordinates, atol=1e-4)
    spectra = [json.loads((folder / "clustering.json").read_text())["spectrum"] for folder in (whole, blocks)]
    assert np.allclose(*(spectrum["singular_values"] for spectrum in spectra), rtol=1e-4)


def test_a_budget_that_nothing_fits_stops_the_run(values: dict) -> None:
    values["clustering"]["memory_budget_gib"] = 0.001
    with pytest.raises(ConfigError, match="clustering needs at least"):
        run(GradientSpaceConfig.from_dict(values), until="cluster")
