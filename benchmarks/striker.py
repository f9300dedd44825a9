"""Strike a process at a recorded write: it kills itself, or finds its disk full.

Recorded writes are what Python does to files below a folder (open for writing, sync, rename, link, remove, make or
remove a folder), and every file that a library writes by itself (safetensors, Parquet), which a kill leaves
half-written. Each process of a chain is struck at the first write that no earlier one was struck at, until one comes
through.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors.numpy

from gradientspace import run_folder

# Names of Python's audit events.
WRITES = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
NEED_SPACE = ("open", "os.rename", "os.link", "os.mkdir", "sync", "library")


class Striker:
    """Strikes once, at the first write below `root` that is not in the file `struck` and belongs to this chain.

    `kind`: "kill" or "full". Of `chains` chains, chain `chain` takes the writes whose names hash to it.
    """

    def __init__(self, root: Path, *, kind: str, struck: str, chain: int, chains: int) -> None:
        self.root, self.kind, self.chain, self.chains = str(root) + os.sep, kind, chain, chains
        self.seen = set(Path(struck).read_text().splitlines()) if Path(struck).exists() else set()
        self.log = os.open(struck, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.stage, self.armed = "start", True

    def install(self) -> None:
        say = run_folder.say

        def listen(message: str) -> None:
            if message.endswith(" ..."):
                self.stage = message.removesuffix(" ...")
            say(message)

        run_folder.say = listen
        sync = os.fsync

        def fsync(handle: int) -> None:
            self.at("sync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        os.fsync = fsync
        for module in (safetensors.numpy, sys.modules.get("safetensors.torch")):
            if module is not None:
                module.serialize_file = self.of_a_library(module.serialize_file)
        pq.write_table = self.of_a_library(pq.write_table)
        sys.addaudithook(self.listen)

    def of_a_library(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """A writer (content, path, …) that may be struck in the middle of its file."""

        def struck(content: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            if self.kind == "full":
                self.at("library", path)
            result = write(content, path, *arguments, **options)
            if self.kind == "kill" and self.is_due("library", path):
                os.truncate(path, os.path.getsize(path) // 2)
                self.strike()
            return result

        return struck

    def listen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = os.fspath(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # relative to an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        self.at(event, path)

    def at(self, event: str, path: Any) -> None:
        if self.is_due(event, path):
            self.strike()

    def is_due(self, event: str, path: Any) -> bool:
        full = os.path.abspath(os.fspath(path))
        if not self.armed or not full.startswith(self.root) or (self.kind == "full" and event not in NEED_SPACE):
            return False
        self.name = f"{self.stage} {event} {full.removeprefix(self.root)}"
        return self.name not in self.seen and zlib.crc32(self.name.encode()) % self.chains == self.chain

    def strike(self) -> None:
        self.armed = False  # a full disk is one failed write here: what cleans up after it may write
        os.write(self.log, f"{self.name}\n".encode())
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")
