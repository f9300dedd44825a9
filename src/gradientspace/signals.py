"""Ctrl-C and SIGTERM end a command in order, whatever library is at work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as Ctrl-C does."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """While the block runs, SIGTERM and Ctrl-C unwind it, even where a library that was interrupted makes an error of
    its own of it. In a thread, or where somebody else handles a signal, nothing changes.
    """
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ours = {s: default for s, default in defaults.items() if signal.getsignal(s) == default}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    stopped: list[KeyboardInterrupt] = []

    def stop(number: int, _: object) -> None:
        stopped.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise stopped[-1]

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if stopped:
            raise stopped[0] from error
        raise
    finally:
        for number, default in ours.items():
            signal.signal(number, default)
