"""Progress for people: a bar with an estimate on a terminal, plain lines elsewhere. Knows nothing of the method."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from gradientspace.memory import resident_bytes

PLAIN_INTERVAL = 10.0
"""Seconds between two plain progress lines where the output is not a terminal."""


_heading: list[str] = []
"""The step that has begun but said nothing yet."""
_silent = False


def silence() -> None:
    """Say nothing more: another process of the same run speaks for all."""
    global _silent
    _silent = True


def begin_step(number: int, names: Sequence[str]) -> None:
    """Name step `number` (from 0) of `names` and the one after it, before the first thing it says.

    A step that finds all its work done says nothing, and is not named either.
    """
    following = f"; next: {names[number + 1]}" if number + 1 < len(names) else ""
    _heading[:] = [f"[{number + 1}/{len(names)}] {names[number]}{following}"]


def say(message: str) -> None:
    """One line on stderr, which keeps stdout for results."""
    for line in () if _silent else (*_heading, message):
        print(line, file=sys.stderr, flush=True)
    _heading.clear()


class Progress:
    """Counts work of known size. On a terminal a tqdm bar; else a line every `PLAIN_INTERVAL` seconds."""

    def __init__(self, label: str, total: float, unit: str = "it") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and not _silent:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, leave=False, dynamic_ncols=True)

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(_memory(), refresh=False)
            self._bar.update(amount)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL:
            self._last = now
            rate = self.done / (now - self._start)
            left = max(0.0, self.total - self.done) / rate if rate else float("inf")
            say(f"  {self.label}: {self.done:.0f}/{self.total:.0f} {self.unit}, "
                f"{rate:.1f} {self.unit}/s, about {left:.0f} s left, {_memory()}")  # fmt: skip

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def no_loading_bar() -> Iterator[None]:
    """transformers draws a bar of its own for loading weights; ours is the only progress users see."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _memory() -> str:
    return f"{resident_bytes() / 2**30:.1f} GB"
