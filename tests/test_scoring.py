"""Scorers against answers worked out by hand, and the sandbox against programs that misbehave."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import micro_values

from gradientspace import sandbox
from gradientspace.config import GradientSpaceConfig
from gradientspace.data import Sample
from gradientspace.errors import ConfigError
from gradientspace.sandbox import passes
from gradientspace.scoring import SCORERS, distinct, normalise_answer, score


def sample(reference: str, prompt: str = "", source: str | None = None, domain: str | None = None) -> Sample:
    return Sample("a", prompt, [1, 2], [-100, 2], reference, domain, source, 1, [])


@pytest.mark.parametrize(
    ("scorer", "answer", "reference", "right"),
    [
        ("exact", "a  b\n", "a b", 1),
        ("exact", "A b", "a b", 0),
        ("number", "so it is 1,080.0 in all", "3 * 2 = 6\n#### 1080", 1),
        ("number", "#### -3", "#### 3", 0),
        ("number", "no idea", "#### 3", 0),
        ("number", "#### 7 apples, not 9\n#### 8", "#### 8", 1),
        ("answer", "The $508.5 million.", "508.5 million", 1),
        ("answer", "(8.9)", "-8.9", 1),
        ("answer", "3.6", "+3.6%", 1),
        ("answer", "508.5 billion", "508.5 million", 0),
    ],
)
def test_scorers_by_hand(scorer: str, answer: str, reference: str, right: float) -> None:
    assert SCORERS[scorer](answer, sample(reference)) == right


def test_normalising_twice_changes_nothing() -> None:
    for text in ("The  $1,000.50, in (2019)!", "a", "-", "5%"):
        once = normalise_answer(text)
        assert normalise_answer(once) == once


def test_each_source_has_its_scorer() -> None:
    samples = [sample("#### 4", source="gsm8k"), sample("#### 4", source="other"), sample("#### 4", domain="math")]
    assert score(["it is 4"] * 3, samples, {"gsm8k": "number", "math": "number"}) == [1.0, 0.0, 1.0]


MBPP = "Write a function.\nYour code should pass these tests:\nassert twice(2) == 4\nassert twice(0) == 0"
HUMANEVAL = 'Complete this Python function.\ndef twice(x):\n    """\n    >>> twice(2)\n    4\n    """'


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        (MBPP, "def twice(x):\n    return 2 * x", 1),
        (MBPP, "Sure:\n```python\ndef twice(x):\n    return 2 * x\n```\nDone.", 1),
        (MBPP, "def twice(x):\n    return x", 0),
        (MBPP, "def twice(x) return", 0),
        (HUMANEVAL, "    return 2 * x", 1),
        (HUMANEVAL, "def twice(x):\n    return x + x", 1),
        (HUMANEVAL, "    return 5", 0),
        ("Complete this.\ndef f():", "    return 1", 0),  # nothing to run: exact match with the reference
    ],
)
def test_code_is_right_when_it_passes_what_the_prompt_asks(prompt: str, answer: str, right: float) -> None:
    assert SCORERS["code"](answer, sample("    return 2", prompt)) == right


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(3)",
        "bytearray(2 * 2**30)",
        "open('big', 'wb').write(b'x' * 2**22)",
        "import os\nassert 'SECRET' not in os.environ\nassert os.listdir('.') == ['program.py']\nraise ValueError",
        "import numpy",
    ],
)
def test_a_program_over_its_limits_fails(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert not passes(program)


def test_an_endless_program_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    start = time.perf_counter()
    assert not passes("import time\nwhile True: time.sleep(1)")
    assert not passes("while True: pass")
    assert time.perf_counter() - start < 8


def test_constants_reach_the_program_as_text() -> None:
    assert passes("assert TEXT == 'a\"\\n\\'b'", {"TEXT": "a\"\n'b"})


def test_distinct_n() -> None:
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["a b", "a b"], 1) == 0.5
    assert distinct(["a"], 2) == 0.0


def test_code_runs_only_when_asked(micro_model: Path, micro_mix: Path) -> None:
    values = micro_values(micro_model, micro_mix, "runs")
    values["evaluation"]["scorers"] = {"mbpp": "code"}
    with pytest.raises(ConfigError, match="run_code"):
        GradientSpaceConfig.from_dict(values).validate()
    values["evaluation"] |= {"run_code": True}
    GradientSpaceConfig.from_dict(values).validate()
    values["evaluation"]["scorers"] = {"mbpp": "judge"}
    with pytest.raises(ConfigError, match="use exact, number, answer or code"):
        GradientSpaceConfig.from_dict(values).validate()
