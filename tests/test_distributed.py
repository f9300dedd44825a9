"""Several processes do what one does, to the same bytes; a lost one ends all of them in one line, and the run resumes.

The passes are tested with ranks as threads of this process, on gloo; whole runs with torchrun.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import micro_values
from planted import planted_rows
from sklearn.metrics import adjusted_rand_score

from gradientspace import online_pass
from gradientspace.assignments import Assignments
from gradientspace.clustering import OnlineSVDClusterer
from gradientspace.config import GradientSpaceConfig
from gradientspace.gradients import GradientBatch
from gradientspace.projection import ProjectedRows
from gradientspace.ranks import Ranks, ranks
from gradientspace.run_folder import Run

suite = [
    pytest.mark.distributed,
    pytest.mark.skipif("GRADIENTSPACE_DISTRIBUTED" not in os.environ, reason="make test-distributed runs it"),
]


# ------------------------------------------------------------------ ranks as threads


class Threads:
    """`size` ranks, each a thread with its own gloo group."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.store, self.here = size, dist.HashStore(), threading.local()
        monkeypatch.setattr(online_pass, "ranks", lambda: self.here.ranks)

    def run(self, work: Callable[[], object]) -> list:
        """The results of `work` on every rank."""
        results: list = [None] * self.size
        threads = [threading.Thread(target=self._run, args=(r, work, results)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def _run(self, rank: int, work: Callable[[], object], results: list) -> None:
        try:
            group = dist.ProcessGroupGloo(self.store, rank, self.size, timedelta(seconds=30)) if self.size > 1 else None
            self.here.ranks = Ranks(rank, self.size, group, self.store)
            results[rank] = work()
        except BaseException as error:
            results[rank] = error


class Engine:
    """Stands in for the gradient engine: the rows are there already, row 7 is not finite."""

    device = torch.device("cpu")

    def __init__(self, rows: torch.Tensor, batch: int = 9) -> None:
        self.rows, self.dim, self.size = rows, rows.shape[1], batch

    def plan(self, samples, **_):
        return [list(range(i, min(i + self.size, len(samples)))) for i in range(0, len(samples), self.size)]

    def batch(self, samples, indices):
        kept = torch.tensor([i for i in indices if i != 7])
        rows = self.rows[kept].clone()
        return GradientBatch(kept, rows, rows[:, 0].clone(), rows.norm(dim=1))


class Words:
    """A sample of n tokens."""

    def __init__(self, n: int) -> None:
        self.id, self.input_ids = str(n), list(range(n))


ROWS = planted_rows(200, 60, 3, 0.6)
SAMPLES = [Words(1 + i % 50) for i in range(200)]


def learned(size: int, monkeypatch, sync_every: int = 0, **options):
    """Clusterer and assignments after a pass by `size` ranks."""
    threads, rows = Threads(size, monkeypatch), ROWS[0]
    config = GradientSpaceConfig()
    config.clustering.sync_every = sync_every

    def work():
        options_of_all = {"n_components": 8, "cache_size": 6, "random_state": 0} | options
        clusterer = OnlineSVDClusterer(3, **options_of_all).initialize(rows[:60])
        table = Assignments.empty(SAMPLES, 8) if threads.here.ranks.rank == 0 else None
        projected = ProjectedRows(200, 60, 8, 0)
        online_pass.learn(Engine(rows), clusterer, SAMPLES, config, behind=0, projected=projected, table=table)
        return clusterer, table, projected.rows

    return threads.run(work)[0]


@pytest.mark.parametrize("options", [{}, {"update": "mean"}, {"update": "running"}, {"cache_dtype": "bfloat16"}])
@pytest.mark.parametrize("sync_every", [0, 40])
def test_the_number_of_ranks_changes_no_bit(monkeypatch, options, sync_every):
    clusterer, table, projected = learned(1, monkeypatch, sync_every, **options)
    assert (table.cluster[7], table.norm[7]) == (-1, 0)
    assert adjusted_rand_score(ROWS[1], table.cluster) > 0.95
    for size in (2, 4):
        other, same, rows = learned(size, monkeypatch, sync_every, **options)
        assert (other.state.matrix == clusterer.state.matrix).all()
        assert (other.state.counts == clusterer.state.counts).all()
        assert (other.state.strengths == clusterer.state.strengths).all()
        for name in ("cluster", "cosine", "margin", "norm", "loss", "coordinates"):
            np.testing.assert_array_equal(getattr(same, name), getattr(table, name))
        np.testing.assert_array_equal(rows, projected)


def test_alone_a_window_of_one_batch_is_partial_fit(monkeypatch):
    clusterer, table, _ = learned(1, monkeypatch)
    rows = ROWS[0]
    plain = OnlineSVDClusterer(3, 0, n_components=8, cache_size=6).initialize(rows[:60])
    for indices in Engine(rows).plan(SAMPLES):
        indices = [i for i in indices if i != 7]
        assert plain.partial_fit(rows[indices]).labels_.tolist() == table.cluster[indices].tolist()
    assert (plain.finalize().state.matrix == clusterer.state.matrix).all()


def test_centroids_rest_within_a_window():
    rows = ROWS[0]
    state = OnlineSVDClusterer(3, 0, n_components=8, cache_size=4).initialize(rows[:60]).state
    before, view = state.centres.clone(), state.project(rows[60:120].clone())
    state.push(view, view.cosine.argmax(dim=1))
    assert (state.centres == before).all()
    assert state.moved
    state.sync()
    assert (state.centres != before).any()


def test_windows_end_with_the_batch_that_fills_them():
    assert online_pass.window_ends([3, 3, 3, 3, 1], 0) == {0, 1, 2, 3, 4}
    assert online_pass.window_ends([3, 3, 3, 3, 1], 5) == {1, 3}


def test_batches_are_dealt_by_tokens():
    assert online_pass.deal([5, 1, 4, 2, 4], 2) == [0, 0, 1, 0, 1]
    assert online_pass.deal([5, 1, 4], 1) == [0, 0, 0]


def test_rank_0_gets_every_batch_in_order(monkeypatch):
    threads, rows = Threads(3, monkeypatch), ROWS[0]

    def work():
        return list(online_pass.gather(Engine(rows), SAMPLES, GradientSpaceConfig()))

    first, *others = threads.run(work)
    assert others == [[], []]
    assert torch.cat([b.indices for b in first]).tolist() == [i for i in range(200) if i != 7]
    assert all((b.gradients == rows[b.indices]).all() for b in first)


def test_a_number_of_a_queue_is_on_one_rank(monkeypatch):
    threads = Threads(3, monkeypatch)
    taken = threads.run(lambda: [list(threads.here.ranks.queue(5)), list(threads.here.ranks.queue(2))])
    assert sorted(k for first, _ in taken for k in first) == [0, 1, 2, 3, 4]
    assert sorted(k for _, second in taken for k in second) == [0, 1]


def test_without_a_launcher_there_is_one_rank():
    here = ranks()
    assert (here.rank, here.size, here.broadcast("x")) == (0, 1, "x")
    assert list(here.queue(2)) == [0, 1]


# ------------------------------------------------------------------ whole runs


def torchrun(n: int, *words: str, launcher: str = "torchrun") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    if launcher == "accelerate":
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # Equal thread counts: sums in another order are other bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command += ["-m", "gradientspace", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out + err


def stage_bytes(folder: Path, *stages: str) -> dict[str, bytes]:
    """Without the cards, which the last step of a whole run writes."""
    files = (
        p for stage in stages for p in sorted((folder / stage).rglob("*")) if p.is_file() and p.name != "README.md"
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


STAGES = ("warmup", "clustering", "shared", "experts")


@pytest.mark.e2e
def test_two_processes_leave_the_bytes_of_one(finished_run: Run, tmp_path: Path) -> None:
    values = finished_run.config.to_dict() | {"output_dir": str(tmp_path), "name": "two"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    said = finish(torchrun(2, "experts", str(tmp_path / "two.yaml")))
    assert said.count("clustering done") == 1  # rank 0 speaks for both
    assert stage_bytes(tmp_path / "two", *STAGES) == stage_bytes(finished_run.path, *STAGES)
    assert list(Run.open(tmp_path / "two").manifest()["stages"])[-2:] == ["experts/0", "experts/1"]


def micro_config(model: Path, mix: Path, folder: Path, name: str, **clustering) -> Path:
    values = micro_values(model, mix, folder) | {"name": name, "evaluation": {"baselines": ["random"]}}
    values["gradients"] = {"max_tokens_per_batch": 256, "projection_dim": 2048}
    values["data"]["n_validation"] = 150  # more than a batch holds, so that a budget can be too small for them alone
    values["clustering"] |= {"n_clusters": 3, **clustering}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"{name}.yaml"


class TestSuite:
    """make test-distributed"""

    pytestmark = suite

    @pytest.mark.parametrize("clustering", [{}, {"sync_every": 48}, {"target": "plain", "settle": "exact"}])
    def test_one_two_and_four_processes(self, micro_model, micro_mix, tmp_path, clustering):
        for n in (1, 2, 4):
            config = micro_config(micro_model, micro_mix, tmp_path, f"by-{n}", **clustering)
            finish(torchrun(n, "run", str(config)))
        stages = [*STAGES, "router", "single", "baselines"]
        expected = stage_bytes(tmp_path / "by-1", *stages)
        assert expected
        for n in (2, 4):
            assert stage_bytes(tmp_path / f"by-{n}", *stages) == expected

    def test_validation_gradients_made_block_by_block(self, micro_model, micro_mix, tmp_path):
        budget = {"memory_budget_gib": 0.0012, "target": "plain"}
        for n in (1, 2):
            config = micro_config(micro_model, micro_mix, tmp_path, f"by-{n}", **budget)
            said = finish(torchrun(n, "cluster", str(config)))
        assert "do not fit" in said
        assert stage_bytes(tmp_path / "by-1", "clustering") == stage_bytes(tmp_path / "by-2", "clustering")

    def test_accelerate_launches_it_too(self, micro_model, micro_mix, tmp_path):
        for launcher in ("torchrun", "accelerate"):
            config = micro_config(micro_model, micro_mix, tmp_path, launcher)
            finish(torchrun(2, "cluster", str(config), launcher=launcher))
        assert stage_bytes(tmp_path / "torchrun", "clustering") == stage_bytes(tmp_path / "accelerate", "clustering")

    def test_a_wrong_config_is_one_line_and_every_rank_ends(self, tmp_path):
        (tmp_path / "bad.yaml").write_text("modle: {}\n")
        process = torchrun(2, "run", str(tmp_path / "bad.yaml"))
        _, err = process.communicate(timeout=300)
        assert process.returncode != 0
        assert len(re.findall("^gradientspace: error: ", err, re.MULTILINE)) == 1

    @pytest.mark.parametrize("stage", ["clustering", "experts/"])
    @pytest.mark.parametrize("victim", [0, 2])
    def test_a_lost_rank_is_named_and_the_run_resumes(self, micro_model, micro_mix, tmp_path, stage, victim):
        whole = micro_config(micro_model, micro_mix, tmp_path, "whole")
        finish(torchrun(1, "experts", str(whole)))
        config = micro_config(micro_model, micro_mix, tmp_path, "broken")
        said = []
        with torchrun(3, "experts", str(config)) as process:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if line.startswith(f"{stage}"):
                    os.kill(rank_pid(process.pid, victim), signal.SIGKILL)
                    break
            start = time.monotonic()
            said += process.stderr.readlines()
        assert process.returncode != 0
        assert time.monotonic() - start < 60
        lines = [line for line in said if line.startswith("gradientspace: error: ")]
        assert lines == [
            f"gradientspace: error: rank {victim} of 3 was lost: start the same command again, "
            "it goes on from what is finished\n"
        ]
        finish(torchrun(2, "experts", str(config)))
        assert stage_bytes(tmp_path / "broken", *STAGES) == stage_bytes(tmp_path / "whole", *STAGES)


def rank_pid(launcher: int, rank: int) -> int:
    """torchrun starts its processes in the order of their ranks."""
    import psutil

    children = [p for p in psutil.Process(launcher).children() if "gradientspace" in p.cmdline()]
    return sorted(p.pid for p in children)[rank]
