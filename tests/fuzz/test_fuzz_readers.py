"""What a run, an adapter, a router or a clusterer leaves on disk, changed by somebody: read, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import case, search
from hypothesis import given
from hypothesis import strategies as st
from mutations import apply, links, mutations

from gradientspace import cli
from gradientspace.assignments import Assignments
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.encoder import Encoder
from gradientspace.errors import RunFolderError
from gradientspace.export import check_adapter, copy_adapter
from gradientspace.files import write_json
from gradientspace.grouping import Groups
from gradientspace.inference import expert_folders
from gradientspace.models import load_base, lora
from gradientspace.routable import RoutableMap
from gradientspace.router import Router
from gradientspace.run_folder import Run
from gradientspace.stacked import StackedExperts

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.fuzz,
    pytest.mark.usefixtures("in_tmp_path"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
_NUMBERS = itertools.count()


class Place:
    """`area/outside` must stay as it is; `area/run` is the case's own."""

    def __init__(self, area: Path) -> None:
        self.area, self.outside = area, area / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.txt").write_text("secret\n")

    def copy(self, source: Path) -> Path:
        folder = self.area / f"case-{next(_NUMBERS)}" / source.name
        folder.parent.mkdir()
        links(source, folder)
        return folder

    def done(self, folder: Path) -> None:
        shutil.rmtree(folder.parent)
        assert [p.name for p in self.area.iterdir()] == ["outside"]
        assert [(p.name, p.read_text()) for p in self.outside.iterdir()] == [("secret.txt", "secret\n")]
        assert not Path("owned").exists()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "area")


@pytest.fixture(scope="module")
def pieces(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The smallest folders that each reader needs, apart from the run, so that a case is cheap."""
    root = tmp_path_factory.mktemp("pieces")
    for name in ("router", "clustering"):
        shutil.copytree(finished_run.path / name, root / name)
    adapters = root / "experts"
    for k in (0, 1):
        (adapters / str(k)).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(finished_run.path / "experts" / str(k) / file, adapters / str(k) / file)
    return {name: root / name for name in ("router", "clustering", "experts")}


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fuzz(surface: str, share: float, place: Place, source: Path, files: list[str], read: Callable[[Path], Any]) -> None:
    untouched = place.copy(source)
    read(untouched)  # or every change would be refused with good reason
    place.done(untouched)

    @search(surface, share)
    @given(changes=mutations(files))
    def run(changes: list[tuple[str, str, int, int]]) -> None:
        folder = place.copy(source)
        apply(folder, changes, place.outside)
        try:
            with case(surface, folder.parent):
                read(folder)
        finally:
            place.done(folder)

    run()


# --------------------------------------------------------------------------- router


@pytest.fixture
def one_encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """The real encoder, loaded once."""
    import gradientspace.encoder as module

    encoder, load = Encoder(), module._load
    encoder.encode(["warm up"])
    here = str(encoder.source.folder)
    monkeypatch.setattr(module, "_load", lambda f, *rest: encoder._loaded if f == here else load(f, *rest))
    return encoder


def test_a_changed_router_routes_or_is_refused(place: Place, pieces: dict[str, Path], one_encoder: Encoder) -> None:
    def read(folder: Path) -> None:
        probabilities = Router.load(folder).predict_proba(["Count the letters of: red green", "x"])
        assert np.isfinite(probabilities).all()
        assert np.allclose(probabilities.sum(axis=1), 1)

    fuzz("router", 1, place, pieces["router"], ["router.json", "head.safetensors"], read)


# --------------------------------------------------------------------------- clustering


def test_a_changed_clusterer_goes_on_or_is_refused(place: Place, pieces: dict[str, Path]) -> None:
    def read(folder: Path) -> None:
        clusterer = OnlineSVDClusterer.load(folder)
        rows = torch.ones(4, clusterer.n_features_in_)
        labels = torch.as_tensor(clusterer.partial_fit(rows).finalize().predict(rows))
        assert bool(((labels >= -1) & (labels < clusterer.n_clusters_)).all())
        assert bool(torch.isfinite(torch.as_tensor(clusterer.cluster_centers_)).all())

    files = ["clusterer.json", "clusterer.safetensors"]
    fuzz("clusterer-snapshot", 0.6, place, pieces["clustering"], files, read)


def test_a_changed_routable_map_predicts_or_is_refused(place: Place, pieces: dict[str, Path]) -> None:
    def read(folder: Path) -> None:
        loaded = RoutableMap.load(folder)
        prediction = loaded.predict(torch.ones(2, len(loaded.coefficients_) - 1))
        assert bool(torch.isfinite(torch.as_tensor(prediction.coordinates)).all())

    source = pieces["clustering"] / "routable"
    fuzz("clusterer-snapshot", 0.25, place, source, files_of(source), read)


def test_changed_assignments_are_read_or_refused(place: Place, pieces: dict[str, Path]) -> None:
    def read(folder: Path) -> None:
        groups = Groups.read(folder)
        assert sum(groups.sizes) <= len(groups.fit)
        table = Assignments.read(folder / "assignments.parquet")
        table.relabel(table.cluster.copy(), np.eye(table.coordinates.shape[1], dtype=np.float32)[:1].repeat(9, 0))

    files = ["clustering.json", "assignments.parquet", "held_out.parquet"]
    fuzz("clusterer-snapshot", 0.15, place, pieces["clustering"], files, read)


# --------------------------------------------------------------------------- adapters


def test_changed_adapters_answer_or_are_refused(place: Place, pieces: dict[str, Path], finished_run: Run) -> None:
    base = load_base(finished_run.config.model)
    names = sorted(name for name, _ in base.named_modules())

    def read(folder: Path) -> None:
        try:
            with (
                StackedExperts(base, {f"expert_{f.name}": f for f in expert_folders(folder)}) as experts,
                torch.no_grad(),
            ):
                with experts.batch([0, 1]) as model:
                    logits = model(input_ids=torch.tensor([[5, 6], [7, 8]])).logits
                assert bool(torch.isfinite(logits).all())
        finally:
            assert sorted(name for name, _ in base.named_modules()) == names, "the base is not as it was"

    fuzz("adapters", 0.4, place, pieces["experts"], files_of(pieces["experts"]), read)


def test_changed_adapters_are_exported_or_refused(place: Place, pieces: dict[str, Path]) -> None:
    def read(folder: Path) -> None:
        config = check_adapter(folder, "vllm")
        copy_adapter(folder, folder.parent / "copy", max(8, config["r"]))

    fuzz("adapters", 0.4, place, pieces["experts"] / "0", files_of(pieces["experts"] / "0"), read)


def test_training_starts_from_a_changed_adapter_or_refuses(
    place: Place, pieces: dict[str, Path], finished_run: Run
) -> None:
    base = load_base(finished_run.config.model)

    def read(folder: Path) -> None:
        with lora(base, finished_run.config.lora, start=folder, seed=0):
            pass

    fuzz("adapters", 0.2, place, pieces["experts"] / "0", ["adapter_model.safetensors"], read)


# --------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def slim(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without figures and base weights; every recorded file is there."""
    folder = tmp_path_factory.mktemp("slim") / "micro"
    shutil.copytree(finished_run.path, folder, ignore=shutil.ignore_patterns("figures", "logs", "report.html"))
    return folder


READ_BY_INSPECT = [
    "config.yaml",
    "manifest.json",
    "rows/rows.parquet",
    "clustering/assignments.parquet",
    "stages.json",
]
COMMANDS = [
    ["inspect", "RUN", "--limit", "3"],
    ["inspect", "RUN", "--boundary", "--sort", "loss", "--limit", "2"],
    ["inspect", "RUN", "--cluster", "0", "--source", "train", "--export", "RUN/out.jsonl"],
]


def command(words: list[str], folder: Path, capture: io.StringIO) -> int:
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(capture):
            return cli.main([word.replace("RUN", str(folder)) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def run_command(words: list[str], folder: Path, outcome: Any) -> None:
    errors = io.StringIO()
    code = command(words, folder, errors)
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("gradientspace: error:")]
    assert code in (0, 2), errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    if code == 2:
        assert len(lines) == 1, errors.getvalue()
        outcome.refuse(lines[0])


@search("run-folder", 0.7)
@given(changes=mutations(READ_BY_INSPECT), words=st.sampled_from(COMMANDS))
def test_a_changed_run_is_inspected_or_refused(place: Place, slim: Path, changes: Any, words: list[str]) -> None:
    folder = place.copy(slim)
    apply(folder, changes, place.outside)
    try:
        with case("run-folder", folder.parent) as outcome:
            run_command(words, folder, outcome)
    finally:
        place.done(folder)


@search("run-folder", 0.3)
@given(changes=mutations(["config.yaml", "manifest.json", "stages.json"]))
def test_a_changed_run_is_opened_and_written_to_or_refused(place: Place, slim: Path, changes: Any) -> None:
    """The bookkeeping that a start does: lock, look at the stages, forget, record."""
    folder = place.copy(slim)
    apply(folder, changes, place.outside)
    try:
        with case("run-folder", folder.parent):
            run = Run.open(folder)
            with run.lock():
                run.costs(), run.stages_below("experts"), run.fingerprint(("clustering",))
                run.stage("extra", lambda partial: write_json(partial / "x.json", 1), inputs=("clustering",))
                run.discard_made_from("clustering")
    finally:
        place.done(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_changed_run_is_reported_or_refused(place: Place, slim: Path) -> None:
    names = [f for f in files_of(slim) if f.endswith((".json", ".parquet")) and "tokenizer" not in f]

    from gradientspace.cards import write_cards
    from gradientspace.report import write_report

    def read(folder: Path) -> None:
        run = Run.open(folder)
        write_report(run)
        write_cards(run)

    fuzz("report", 1, place, slim, names, read)


# --------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", [".lock", ".manifest.json.tmp", ".report.html.tmp", "figures", "extra.partial"])
def test_nothing_is_written_through_a_link(place: Place, slim: Path, name: str) -> None:
    from gradientspace.report import write_report

    folder = place.copy(slim)
    target = place.outside / ("secret.txt" if name.startswith(".") else ".")
    (folder / name).unlink(missing_ok=True)
    os.symlink(target, folder / name)
    run = Run.open(folder)
    drawn = name in (".report.html.tmp", "figures")
    for act in (
        lambda: _lock(run),
        lambda: run.stage("extra", lambda p: write_json(p / "x.json", 1)),
        *([lambda: write_report(run)] if drawn else []),
    ):
        with contextlib.suppress(RunFolderError, OSError):  # refused is as good as made anew
            act()
    place.done(folder)


def _lock(run: Run) -> None:
    with run.lock():
        pass
