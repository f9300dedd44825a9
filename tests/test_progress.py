"""What a person at the terminal sees: the step and what is next, rate, estimate and memory."""

from __future__ import annotations

import re

import pytest

from gradientspace import progress
from gradientspace.progress import Progress, begin_step, say


def test_a_step_is_named_with_the_next_one_only_when_it_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["data", "warmup", "cluster"]
    begin_step(0, names)
    begin_step(1, names)
    say("warmup ...")
    say("warmup done")
    begin_step(2, names)
    say("clustering ...")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[2/3] warmup; next: cluster", "warmup ...", "warmup done", "[3/3] cluster", "clustering ..."]


def test_plain_lines_show_rate_estimate_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    with Progress("gradients", 10, "sample") as bar:
        bar.advance(4)
    line = capsys.readouterr().err
    assert re.search(r"gradients: 4/10 sample, [\d.]+ sample/s, about \d+ s left, \d+\.\d GB", line)
