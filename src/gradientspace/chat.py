"""`gradientspace chat RUN`: a conversation in the terminal, with the expert that answers shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gradientspace.errors import InputError

if TYPE_CHECKING:
    from gradientspace.inference import RoutedModel

HELP = "/new begins anew, /expert NAME lets NAME answer (auto: routed again), /quit ends; an empty line is skipped"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a finished run folder")
    parser.add_argument("--expert", default="auto", help="who answers: auto, expert_0, …, shared, base")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")


def chat(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.inference import RoutedModel

    model = RoutedModel.from_run(options.run)
    conversation = Conversation(model, options.expert, options.max_new_tokens, options.temperature)
    if sys.stdin.isatty():
        print(f"{', '.join(['auto', *model.names])}. {HELP}")
    for line in _lines():
        try:
            for piece in conversation.reply(line):
                print(piece, end="", flush=True)
        except InputError as error:
            print(f"  {error}", end="")
        print()


def _lines() -> Iterator[str]:
    """What the user types, until the end of input or /quit."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


class Conversation:
    """Turns so far and who answers: the expert that the first turn is routed to, or the one named."""

    def __init__(self, model: RoutedModel, expert: str, max_new_tokens: int, temperature: float) -> None:
        self.model = model
        self.options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.turns: list[dict[str, str]] = []
        self._name(expert)

    def reply(self, line: str) -> Iterator[str]:
        """What to print for one line: the expert's name, then its answer in pieces. Raises `InputError`."""
        if line.startswith("/"):
            yield self._command(line)
            return
        turns = [*self.turns, {"role": "user", "content": line}]
        number, how = self._choose(turns)
        yield f"[{how}] "
        answer = ""
        for piece in self.model.stream(turns, expert=number, **self.options):
            answer += piece
            yield piece
        # Only a whole answer is remembered: an interrupted one would be half a turn.
        self.turns = [*turns, {"role": "assistant", "content": answer.strip()}]

    def _choose(self, turns: list[dict[str, str]]) -> tuple[int, str]:
        from gradientspace.prompts import opening

        if self.expert is not None:
            return self.model.number(self.expert), self.expert
        decision = self.model.route(opening(turns))
        return decision.answering(), f"{decision.name} {decision.probability:.2f}"

    def _command(self, line: str) -> str:
        word, _, argument = line.partition(" ")
        commands: dict[str, Callable[[], str]] = {
            "/new": self._begin_anew,
            "/expert": lambda: self._name(argument.strip()),
        }
        return commands[word]() if word in commands else HELP

    def _begin_anew(self) -> str:
        self.turns = []
        return "a new conversation"

    def _name(self, name: str) -> str:
        if name not in ("auto", *self.model.names):
            raise InputError(f"{name!r} does not exist; there are {', '.join(['auto', *self.model.names])}")
        self.expert = None if name == "auto" else name
        return f"{name} answers"
