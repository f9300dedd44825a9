"""One fuzz case: how it may end, how long it may take, what it may touch. And the count of them, surface by surface.

A case ends well as a result or as a `GradientSpaceError` whose message is one line. Anything else fails: another
exception, more than `SECONDS`, a file written outside the folder that the case was given, a program started, a module
or pickle of the data's loaded. The interpreter itself is asked, by an audit hook, and blocks what must not happen.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import glob
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from gradientspace.doctor import versions
from gradientspace.errors import GradientSpaceError

RESULTS_VARIABLE = "GRADIENTSPACE_FUZZ_JSON"
"""Where the long search writes its counts; unset, a few cases a surface are tried."""
CASES_VARIABLE = "GRADIENTSPACE_FUZZ_CASES"
"""About how many cases in all the long search tries; default: those of `SURFACES`."""
LONG = RESULTS_VARIABLE in os.environ
SECONDS = 20
"""Of the processor, so that a busy machine changes nothing."""
_LONGEST_WAIT = 300
"""Seconds of the clock, for what waits and computes nothing."""
LONGEST_MESSAGE = 1000

SURFACES: dict[str, tuple[int, str]] = {
    "config-yaml": (1600, "config files: a valid one with values and lines changed, and any text"),
    "config-command-line": (1000, "words after `gradientspace run CONFIG`"),
    "data-rows": (1600, "data files: jsonl, json, csv, tsv, Parquet, with strange values, columns and damage"),
    "clusterer-stream": (1400, "arrays and streams of any shape, type and value; any parameters"),
    "clusterer-snapshot": (700, "the clusterer's and the routable map's folders, changed"),
    "server-bodies": (1500, "bodies and headers of completions, chats and routes"),
    "server-schema": (700, "schemathesis on the server's own OpenAPI document"),
    "run-folder": (800, "a finished run's files, changed; opened, inspected, listed"),
    "report": (24, "the report and the cards of a finished run whose files were changed"),
    "adapters": (900, "adapter folders, changed; loaded, stacked, checked for export, padded"),
    "router": (800, "the router's folder, changed"),
    "names": (300, "sources, ids, domains and run names such as ../../x"),
}
"""Surface -> cases of the long search, and what they are."""
_ALL = sum(cases for cases, _ in SURFACES.values())
_QUICK = 190
"""Cases in all that the default suite tries."""
_SCALE = int(os.environ.get(CASES_VARIABLE, _ALL)) / _ALL if LONG else _QUICK / _ALL


def search(surface: str, share: float = 1.0) -> settings:
    """Hypothesis' settings of a test that has `share` of a surface's cases."""
    return settings(
        max_examples=max(3, math.ceil(SURFACES[surface][0] * share * _SCALE)),
        deadline=None,
        database=None,
        derandomize=not LONG,
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Count:
    results: int = 0
    refusals: int = 0
    slowest: float = 0.0
    seconds: float = 0.0


@dataclass
class Outcome:
    """Where an error is shown instead of raised: on the terminal, or in an answer's status."""

    refused: bool = False

    def refuse(self, line: str) -> None:
        check_line(line)
        self.refused = True


counts: defaultdict[str, Count] = defaultdict(Count)


class Broken(AssertionError):
    """A case did what no case may do."""


class _TooLong(BaseException):
    """Raised in the middle of whatever hangs; no `except Exception` swallows it."""


@dataclass
class _Watch:
    """What the audit hook knows of the running case."""

    below: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    """Folders of samples kept on disk that other tests opened: they may close them while a case runs."""
    active: bool = False
    seen: list[str] = field(default_factory=list)


_watch = _Watch()
_CHANGES = {  # event -> places in its arguments: of a path, and of the open folder that the path is relative to
    "os.mkdir": [(0, 2)],
    "os.rename": [(0, 2), (1, 3)],
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.link": [(1, 3)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)],
    "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)],
    "shutil.rmtree": [(0, None)],
    "shutil.move": [(0, None), (1, None)],
}
_FOLLOWING = ("open", "os.truncate", "os.chmod", "os.chown")
"""Events that change what a link points to; the others change the link itself."""
_REMOVALS = ("shutil.rmtree", "os.remove", "os.rmdir")
_RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watch.active:
        return
    if event in _RUNS:
        _refuse(f"{event} {arguments!r:.200}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _check_path(event, path)
    elif event in _CHANGES:
        for place, folder in _CHANGES[event]:
            if isinstance(arguments[place], str | bytes | os.PathLike):
                _check_path(event, arguments[place], -1 if folder is None else arguments[folder])
    elif event == "exec":
        file = getattr(arguments[0], "co_filename", "")
        if os.path.isabs(file) and _is_below(file):  # a module of the data; "<template>" is Jinja's sandbox
            _refuse(f"exec of {file}")


def _check_path(event: str, path: Any, folder: int | None = -1) -> None:
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    if "\0" in text or "__pycache__" in text or text == os.devnull:
        return
    if event in _REMOVALS and text.startswith(_watch.scratch):
        return
    if not _is_below(text, follow=event in _FOLLOWING):
        _refuse(f"{event} {text!r}, outside {_watch.below}")


def _is_below(path: str, *, follow: bool = True) -> bool:
    real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
    if follow and os.path.islink(real):
        real = os.path.realpath(real)
    return any(real == folder or real.startswith(folder + os.sep) for folder in _watch.below)


def _refuse(what: str) -> None:
    _watch.seen.append(what)
    raise PermissionError(f"blocked by the fuzz harness: {what}")


sys.addaudithook(_hook)


def _ring(*_: Any) -> None:
    raise _TooLong


def _set_timers(processor: float, clock: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, clock)


@contextlib.contextmanager
def case(surface: str, *below: Path) -> Iterator[Outcome]:
    """The body is one case of `surface`, which may write into the folders `below` and nowhere else."""
    assert surface in SURFACES
    _watch.below = tuple(os.path.realpath(folder) for folder in below)
    _watch.scratch = tuple(glob.glob(os.path.join(tempfile.gettempdir(), "gradientspace-*")))
    _watch.seen.clear()
    count, start = counts[surface], time.process_time()
    before = {number: signal.signal(number, _ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    _set_timers(SECONDS, _LONGEST_WAIT)
    gc.disable()  # what other tests left behind may end with a clean-up, which is none of this case's doing
    try:
        _watch.active = True
        yield (outcome := Outcome())
        count.refusals += outcome.refused
        count.results += not outcome.refused
    except GradientSpaceError as error:
        check_line(str(error))
        count.refusals += 1
    except _TooLong as error:
        raise Broken(
            f"a case of {surface} took over {SECONDS} s of the processor, or waited for {_LONGEST_WAIT} s"
        ) from error
    finally:
        _watch.active = False
        gc.enable()
        _set_timers(0, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        seconds = time.process_time() - start
        count.slowest, count.seconds = max(count.slowest, seconds), count.seconds + seconds
        if _watch.seen:
            raise Broken(f"a case of {surface}: {_watch.seen[0]}")


def check_line(message: str) -> None:
    """One line that one can read."""
    assert message.strip(), "an error without a message"
    assert len(message.splitlines()) == 1, message
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}"
    assert "\x1b" not in message, repr(message)


def summary() -> dict[str, Any]:
    """The counts so far, as the results file has them."""
    surfaces = {
        name: {
            "what": SURFACES[name][1],
            "cases": count.results + count.refusals,
            "results": count.results,
            "one_line_errors": count.refusals,
            "seconds": round(count.seconds, 1),
            "slowest_seconds": round(count.slowest, 2),
        }
        for name, count in sorted(counts.items())
    }
    return {"schema": 1, "cases": sum(s["cases"] for s in surfaces.values()), "surfaces": surfaces}


def report(write: Callable[[str], object], *, finished: bool) -> None:
    """The counts on the terminal, and of a whole search that found nothing in the results file."""
    found = summary()
    if not LONG or not found["cases"]:
        return
    for name, counted in found["surfaces"].items():
        write(f"{name}: {counted['cases']} cases, {counted['results']} results, {counted['one_line_errors']} lines")
    write(f"fuzz: {found['cases']} cases in all")
    path = Path(os.environ[RESULTS_VARIABLE])
    if finished:
        if path.is_file():  # a run of some surfaces brings their rows up to date
            known = json.loads(path.read_text())["surfaces"]
            found["surfaces"] = dict(sorted({**known, **found["surfaces"]}.items()))
            found["cases"] = sum(surface["cases"] for surface in found["surfaces"].values())
        found |= {"versions": versions(), "machine": platform.machine(), "python": platform.python_version()}
        found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        path.write_text(json.dumps(found, indent=1) + "\n")
