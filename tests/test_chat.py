"""The conversation in the terminal."""

from __future__ import annotations

import io

import pytest
from serving_fixtures import routed  # noqa: F401

from gradientspace.chat import HELP, Conversation
from gradientspace.cli import main
from gradientspace.errors import InputError, UnsureError
from gradientspace.inference import RoutedModel
from gradientspace.run_folder import Run

pytestmark = pytest.mark.e2e


def test_the_expert_of_the_first_turn_stays(routed: RoutedModel) -> None:  # noqa: F811
    conversation = Conversation(routed, "auto", 4, 0.0)
    first = "Repeat these words: cat dog sky"
    name = routed.route(first).name
    said = list(conversation.reply(first))
    assert said[0].startswith(f"[{name} 0.")
    assert "".join(said[1:]).strip() == routed.generate(first, max_new_tokens=4)
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    again = list(conversation.reply("Count the letters of: sun moon sea bird"))
    assert again[0].startswith(f"[{name} ")
    assert len(conversation.turns) == 4


def test_commands(routed: RoutedModel) -> None:  # noqa: F811
    conversation = Conversation(routed, "base", 2, 0.0)
    assert next(conversation.reply("one two")) == "[base] "
    list(conversation.reply("one two"))
    assert list(conversation.reply("/expert shared")) == ["shared answers"]
    assert next(conversation.reply("one")) == "[shared] "
    assert list(conversation.reply("/new")) == ["a new conversation"]
    assert conversation.turns == []
    assert list(conversation.reply("/what")) == [HELP]
    with pytest.raises(InputError, match="'nobody' does not exist; there are auto, expert_0"):
        list(conversation.reply("/expert nobody"))


def test_a_turn_that_fails_is_not_remembered(routed: RoutedModel) -> None:  # noqa: F811
    conversation = Conversation(routed, "auto", 2, 0.0)
    routed.router.threshold, routed.router.fallback = 1.0, "error"
    try:
        with pytest.raises(UnsureError):
            list(conversation.reply("one"))
    finally:
        routed.router.threshold, routed.router.fallback = None, "base"
    assert conversation.turns == []


def test_the_command_reads_lines(finished_run: Run, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n\n/expert nobody\n/quit\nnever\n"))
    assert main(["chat", str(finished_run.path), "--expert", "expert_1", "--max-new-tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[expert_1] ")
    assert "does not exist" in lines[-1]
    assert main(["chat", str(finished_run.path), "--expert", "nobody"]) == 2
