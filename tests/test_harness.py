"""lm-evaluation-harness through the router: each request by its own expert, in order, and logged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gradientspace.inference import Experts, expert_folders
from gradientspace.job import Job
from gradientspace.run_folder import Run

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'gradientspace[harness]'")
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

CONTEXTS = ["Repeat these words: cat dog", "Count the letters of: sea sky", "Repeat these words: red sun"]


@pytest.fixture
def routed(finished_run: Run, tmp_path: Path):
    from gradientspace.harness import RoutedLM

    return RoutedLM(finished_run.path, routes=tmp_path / "routes.jsonl", batch_size=2)


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]  # type: ignore


def test_log_likelihoods_are_those_of_the_routed_experts(routed, finished_run: Run, tmp_path: Path) -> None:
    found = routed.loglikelihood(requests("loglikelihood", [(c, " red one") for c in CONTEXTS]))
    lines = [json.loads(line) for line in (tmp_path / "routes.jsonl").read_text().splitlines()]
    chosen = routed.router.predict(CONTEXTS)
    assert [line["expert"] for line in lines] == chosen.tolist()
    assert all(0 < line["probability"] <= 1 for line in lines)
    job = Job(finished_run)
    with Experts(job.base, expert_folders(finished_run.path / "experts")) as experts, torch.inference_mode():
        for context, expert, (value, _) in zip(CONTEXTS, chosen.tolist(), found, strict=True):
            whole, begin = routed.tok_encode(context + " red one"), len(routed.tok_encode(context))
            with experts.active(expert) as model:
                log_p = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            expected = log_p[torch.arange(begin - 1, len(whole) - 1), torch.tensor(whole[begin:])].sum()
            assert value == pytest.approx(float(expected), rel=1e-4)


def test_answers_come_back_in_order(routed) -> None:
    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    together = routed.generate_until(requests("generate_until", [(c, options) for c in CONTEXTS]))
    alone = [routed.generate_until(requests("generate_until", [(c, options)]))[0] for c in CONTEXTS]
    assert together == alone


def test_whole_texts_are_routed_once_each(routed, tmp_path: Path) -> None:
    found = routed.loglikelihood_rolling(requests("loglikelihood_rolling", [(c,) for c in CONTEXTS]))
    assert np.isfinite(found).all()
    assert len((tmp_path / "routes.jsonl").read_text().splitlines()) == len(CONTEXTS)
