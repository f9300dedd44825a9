"""Clustering a finished run again from its kept coordinates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import micro_values

from gradientspace.cli import main
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import InputError, RunFolderError
from gradientspace.pipeline import run
from gradientspace.recluster import parse_range, recluster
from gradientspace.routable import RoutableMap
from gradientspace.run_folder import Run

pytestmark = pytest.mark.e2e


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(finished_run.path, tmp_path / "micro"))


@pytest.fixture(scope="module")
def plain_run(micro_model: Path, micro_mix: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    values = micro_values(micro_model, micro_mix, tmp_path_factory.mktemp("plain"))
    values["clustering"] |= {"target": "plain"}
    return run(GradientSpaceConfig.from_dict(values), until="cluster")


def test_another_k_replaces_the_clusters_and_removes_what_they_had_made(copied: Run, capsys) -> None:
    assert main(["cluster", str(copied.path), "--k", "3", "--seed", "5"]) == 0
    facts = json.loads((copied.path / "clustering/clustering.json").read_text())
    assert facts["n_clusters"] == 3
    assert facts["reclustered"]["seed"] == 5
    assert facts["reclustered"]["space"] == "routable"
    assert 0 < facts["reclustered"]["energy_of_coordinates"] < 1
    assert "variance" not in facts
    table = pq.read_table(copied.path / "clustering/assignments.parquet")
    assert set(table["cluster"].to_pylist()) <= {-1, 0, 1, 2}
    assert set(pq.read_table(copied.path / "clustering/held_out.parquet")["cluster"].to_pylist()) <= {-1, 0, 1, 2}
    assert OnlineSVDClusterer.load(copied.path / "clustering").n_clusters_ == 3
    assert len(RoutableMap.load(copied.path / "clustering/routable").centres_) == 3
    assert not (copied.path / "experts/0").exists()
    assert copied.has("shared")  # made before the clusters
    assert "agreement of reruns" in capsys.readouterr().out
    again = run(copied.config, until="experts")
    assert sorted(p.name for p in (again.path / "experts").iterdir()) == ["0", "1", "2"]


def test_held_out_labels_are_those_of_full_dimension(plain_run: Run) -> None:
    """The lifted centroids lie in the subspace, so coordinates say exactly what gradients would."""
    groups = recluster(plain_run, 2, seed=3)
    clusterer = OnlineSVDClusterer.load(plain_run.path / "clustering")
    table = pq.read_table(plain_run.path / "clustering/held_out.parquet")
    coordinates = torch.tensor(np.stack(table["coordinates"].to_numpy()))
    centred = coordinates @ clusterer.components_  # a vector of the subspace with these coordinates
    cosine = centred @ clusterer.cluster_centers_.T
    assert cosine.argmax(dim=1).tolist() == groups.held_out.tolist()
    assert groups.facts["reclustered"]["space"] == "coordinates"


def test_the_same_k_and_seed_give_the_same_bytes(copied: Run) -> None:
    recluster(copied, 2, seed=1)
    files = {p.name: p.read_bytes() for p in (copied.path / "clustering").iterdir() if p.is_file()}
    recluster(copied, 2, seed=1)
    assert files == {p.name: p.read_bytes() for p in (copied.path / "clustering").iterdir() if p.is_file()}


def test_a_sweep_looks_and_changes_nothing(copied: Run, tmp_path: Path, capsys) -> None:
    before = (copied.path / "manifest.json").read_bytes()
    paths = [tmp_path / "sweep.json", tmp_path / "sweep.csv"]
    words = ["cluster", str(copied.path), "--sweep", "2..3", "--json", str(paths[0]), "--csv", str(paths[1])]
    assert main(words) == 0
    assert [row["n_clusters"] for row in json.loads(paths[0].read_text())["rows"]] == [2, 3]
    assert paths[1].read_text().startswith("n_clusters,between,stability")
    assert "stability" in capsys.readouterr().out
    assert (copied.path / "manifest.json").read_bytes() == before


def test_what_cannot_be_done_is_one_clear_line(copied: Run, tmp_path: Path, capsys) -> None:
    assert main(["cluster", str(copied.path), "--k", "100000"]) == 2
    assert "K is 100000; the run has" in capsys.readouterr().err
    assert main(["cluster", str(copied.path), "--k", "2", "--sweep", "2..3"]) == 2
    assert main(["cluster", str(tmp_path / "nothing"), "--k", "2"]) == 2
    assert (copied.path / "experts/0").exists()
    copied.config.clustering.method = "embedding"
    with pytest.raises(RunFolderError, match="kept no coordinates"):
        recluster(copied, 2)


@pytest.mark.parametrize("text", ["2", "2..", "5..2", "0..3", "2..9999", "a..b"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--sweep is"):
        parse_range(text)
