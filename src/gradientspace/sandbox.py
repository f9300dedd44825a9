"""Run a program that a model wrote, with limits: time, memory, files, processes, no environment, a folder of its own.

Limits keep a runaway program from harming the machine. They are no wall against a hostile one: it runs as this user and
may read what this user may read. So nothing runs unless it was asked for; use a container for models you do not trust.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SECONDS = 5
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
PROCESSES = 0


def passes(program: str, values: Mapping[str, str] | None = None) -> bool:
    """Does `program` end with exit code 0 within the limits? `values` are text constants that it finds defined."""
    constants = "".join(f"{name} = {json.dumps(text)}\n" for name, text in (values or {}).items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(constants + program, encoding="utf-8")
        process = subprocess.Popen(
            # -I: no user site, no PYTHON* variables; -S: no site packages.
            [sys.executable, "-I", "-S", str(path)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_limit,
        )
        try:
            return process.wait(timeout=2 * SECONDS) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _limit() -> None:
    """In the child: limits that it cannot raise again."""
    for kind, value in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _end(process: subprocess.Popen) -> None:
    """The program and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
