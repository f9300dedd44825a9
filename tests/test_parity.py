"""The self-test refuses to serve what does not answer with its own adapter."""

from __future__ import annotations

import asyncio

import pytest
import torch
from serving_fixtures import micro_backend

from gradientspace.run_folder import Run
from gradientspace.serving import parity
from gradientspace.serving.parity import Fingerprint, ParityError, check_stacked, check_upstream

pytestmark = pytest.mark.e2e


def test_stacked_experts_pass(finished_run: Run) -> None:
    backend = micro_backend(finished_run)
    check_stacked(backend.model, backend.expected)


def test_wrong_weights_are_caught(finished_run: Run) -> None:
    backend = micro_backend(finished_run)
    layer = next(m for m in backend.model.experts.model.modules() if hasattr(m, "selection"))
    with torch.no_grad():
        layer.A[1] += 0.1
    with pytest.raises(ParityError, match="expert_1 differs from plain PEFT"):
        check_stacked(backend.model, backend.expected)


def test_swapped_experts_are_caught(finished_run: Run) -> None:
    backend = micro_backend(finished_run)
    backend.model.experts.names[:2] = ["expert_1", "expert_0"]
    with pytest.raises(ParityError, match=r"expert_\d differs from plain PEFT"):
        check_stacked(backend.model, backend.expected)


def test_an_adapter_that_does_nothing_is_caught(finished_run: Run) -> None:
    backend = micro_backend(finished_run)
    with pytest.raises(ParityError, match="expert_0 answers exactly like the base"):
        check_stacked(backend.model, {**backend.expected, "expert_0": backend.expected["base"]})


def print_of(shift: float) -> Fingerprint:
    return Fingerprint(["a", "b"], [{"a": -0.5 - shift, "b": -2.0}, {"b": -0.7 - shift, "c": -3.0}])


EXPECTED = {
    name: [print_of(s)] * len(parity.CANARIES) for name, s in {"base": 0, "expert_0": 0.3, "expert_1": 0.6}.items()
}


def upstream(answer):
    """Runs the check against an upstream whose answer is `answer(name, number of requests under way)`."""
    running = 0

    async def ask(name: str, ids: list[int]) -> Fingerprint:
        nonlocal running
        running += 1
        await asyncio.sleep(0)
        found = answer(name, running)
        running -= 1
        return found

    asyncio.run(check_upstream(ask, [[1]] * len(parity.CANARIES), EXPECTED))


def moved(name: str, by: float) -> Fingerprint:
    known = EXPECTED[name][0]
    return Fingerprint(known.texts, [{token: p + by for token, p in top.items()} for top in known.tops])


def test_an_honest_upstream_passes_with_its_rounding() -> None:
    upstream(lambda name, _: moved(name, 0.02))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda name, _: "expert_0" if name == "expert_1" else name, "a request for expert_1 as expert_0 does"),
        (lambda name, n: "expert_1" if name == "base" and n > 8 else name, "a request for base as expert_1 does"),
    ],
    ids=["always", "only-in-a-full-batch"],
)
def test_an_upstream_that_answers_with_another_adapter_is_caught(lie, message) -> None:
    with pytest.raises(ParityError, match=message):
        upstream(lambda name, running: EXPECTED[lie(name, running)][0])


def test_an_upstream_with_other_weights_is_caught() -> None:
    with pytest.raises(ParityError, match=r"differs from plain PEFT by 0\.1000 nats"):
        upstream(lambda name, _: moved(name, -0.1))
    with pytest.raises(ParityError, match="differs from plain PEFT by inf nats"):
        upstream(lambda name, _: moved(name, float("nan")))
    with pytest.raises(ParityError, match="differs from plain PEFT by inf nats"):
        upstream(lambda name, _: Fingerprint([], []))


def test_fingerprints_are_compared_until_their_texts_part() -> None:
    known = Fingerprint(["a", "b", "c"], [{"a": -1.0}, {"b": -1.0, "x": -2.0}, {"c": -1.0}])
    found = Fingerprint(["a", "x", "c"], [{"a": -1.5}, {"x": -2.5, "unknown": 0.0}, {"c": -9.0}])
    assert found.distance(known) == pytest.approx(0.5)
