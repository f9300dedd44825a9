"""Model cards say the run's own numbers; a push uploads no data."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from gradientspace.cards import push_to_hub, write_cards
from gradientspace.errors import InputError, RunFolderError
from gradientspace.run_folder import Run

pytestmark = pytest.mark.e2e


def front_matter(card: str) -> dict[str, Any]:
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def test_an_experts_card_holds_the_numbers_of_the_run(finished_run: Run) -> None:
    card = (finished_run.path / "experts/1/README.md").read_text()
    meta = front_matter(card)
    assert meta["library_name"] == "peft"
    assert "gradientspace" in meta["tags"]
    assert "base_model" not in meta, "a folder of this machine is no public id"
    training = json.loads((finished_run.path / "experts/1/training.json").read_text())
    assert f"{training['tokens']:,} tokens" in card
    for label, n in training["domains"].items():
        assert f"{label} {n}" in card
    samples = pq.read_table(finished_run.path / "evaluation/samples.parquet").to_pylist()
    mine = [s for s in samples if s["expert"] == 1]
    assert f"{len(mine)} were routed here" in card
    assert f"{sum(s['loss:gradientspace'] for s in mine) / len(mine):.4f}" in card
    results = json.loads((finished_run.path / "evaluation/results.json").read_text())
    for losses in results["experts"]["loss_by_domain"].values():
        assert f"{losses[1]:.4f}" in card


def test_router_and_run_have_cards(finished_run: Run) -> None:
    results = json.loads((finished_run.path / "evaluation/results.json").read_text())
    assert f"{results['router']['accuracy']:.4f}" in (finished_run.path / "router/README.md").read_text()
    card = (finished_run.path / "README.md").read_text()
    assert results["verdict"][1] in card
    for name, method in results["methods"].items():
        assert f"| {name} | {method['overall']['loss']:.4f} |" in card


def test_cards_repeat(finished_run: Run) -> None:
    before = (finished_run.path / "experts/0/README.md").read_bytes()
    write_cards(finished_run)
    assert (finished_run.path / "experts/0/README.md").read_bytes() == before


class FakeHub:
    """The two calls that reach the network."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error:
            raise self.error
        self.calls["create_repo"] = {"repo_id": repo_id, **options}
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls["upload_folder"] = options


def test_a_push_uploads_experts_and_cards_and_no_data(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert push_to_hub(finished_run, "org/name", private=True) == "https://hub.test/org/name"
    assert hub.calls["create_repo"] == {"repo_id": "org/name", "private": True, "exist_ok": True}
    upload = hub.calls["upload_folder"]
    assert Path(upload["folder_path"]) == finished_run.path
    files = [str(p.relative_to(finished_run.path)) for p in finished_run.path.rglob("*") if p.is_file()]
    sent = [f for f in files if any(fnmatch(f, pattern) for pattern in upload["allow_patterns"])]
    assert {"README.md", "experts/0/adapter_model.safetensors", "experts/0/README.md", "router/README.md"} <= set(sent)
    assert "manifest.json" in sent, "without it the download is no run folder"
    assert not [f for f in sent if f.endswith(".parquet") or f.startswith(("clustering", "baselines", "warmup"))]


def test_what_a_hub_refuses_is_one_line(finished_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import HFValidationError

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub(HFValidationError("bad id\nmore")))
    with pytest.raises(InputError, match=r"^cannot push to a//b: bad id \(log in"):
        push_to_hub(finished_run, "a//b")
    empty = Run.create(finished_run.config.from_dict(finished_run.config.to_dict() | {"output_dir": str(tmp_path)}))
    with pytest.raises(RunFolderError, match="no finished 'evaluation'"):
        push_to_hub(empty, "org/name")
