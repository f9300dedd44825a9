"""The processes of one run: who is here, messages between them, and what is said when one of them is lost.

`torchrun` or `accelerate launch` starts N processes of the same command. Rank 0 runs it; the others wait for its orders
(`distributed.py`). Messages go over gloo, in a group of our own: the libraries below us (transformers' Trainer,
accelerate) are to see one ordinary process on one device, so the launcher's variables are hidden from them.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from gradientspace import progress
from gradientspace.errors import LostRankError

if TYPE_CHECKING:
    from torch import Tensor

    from gradientspace.run_folder import Run

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# A rank waits for as long as another one trains. That one of them has died shows at once: its connections close.
_PATIENCE_DAYS = 30
_LATEST_MINUTES = 30
_GRACE_SECONDS = 2.0


@dataclass
class Ranks:
    """`size` processes, of which this one is number `rank`; by default it is alone."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A `ProcessGroupGloo`."""
    store: Any = None
    """The launcher's key-value store, which outlives any rank."""
    members: list[tuple[str, int]] = field(default_factory=list)
    """Host and process id of every rank."""
    queues: int = 0

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The rank `source`'s value, on every rank, as `messages.py` sends it; what the others pass is not used."""
        if self.size == 1:
            return value
        import torch

        from gradientspace.messages import unpack

        data = _packed(value) if self.rank == source else None
        length = torch.tensor([0 if data is None else len(data)])
        self._broadcast(length, source)
        data = torch.empty(int(length), dtype=torch.uint8) if data is None else data
        self._broadcast(data, source)
        return value if self.rank == source else unpack(data.numpy().tobytes())

    def order(self, name: str, run: Run, **arguments: Any) -> None:
        """Rank 0 asks the others for help with a run (`distributed.WORK` says how); elsewhere nothing happens."""
        if self.rank == 0:
            self.broadcast((name, str(run.path), [str(lender.path) for lender in run.lenders], arguments))

    def broadcast_rows(self, rows: Tensor, source: int) -> None:
        """Fill `rows`, a contiguous tensor on the CPU, with those of the rank `source`."""
        if self.size > 1:
            self._broadcast(rows, source)

    def send(self, rows: Tensor, to: int) -> Any:
        """Start to send a tensor to a rank that knows its shape. Give what comes back to `wait`."""
        rows = _as_bytes(rows.cpu())
        with self._watching(to):
            return to, rows, self.group.send([rows], to, 0)

    def wait(self, sent: list[Any]) -> None:
        """Until everything in `sent` has left."""
        for to, _, work in sent:
            with self._watching(to):
                work.wait()

    def receive(self, rows: Tensor, source: int) -> Tensor:
        """Fill `rows`, a contiguous tensor on the CPU, with what the rank `source` sends."""
        with self._watching(source):
            self.group.recv([_as_bytes(rows)], source, 0).wait()
        return rows

    def queue(self, n: int) -> Iterator[int]:
        """Numbers below n, each on exactly one rank: whoever is free takes the next. All ranks call this alike."""
        self.queues += 1
        if self.size == 1:
            yield from range(n)
            return
        with self._watching():
            while (number := self.store.add(f"queue {self.queues}", 1) - 1) < n:
                yield number

    def meet(self) -> None:
        """Until every rank has come here."""
        for source in range(self.size):
            self.broadcast(None, source)

    # ------------------------------------------------------------- begin and end

    @classmethod
    def join(cls) -> Ranks:
        """This process's place among those that the launcher started; raises `LostRankError` where one is missing."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        local = int(os.environ.get("LOCAL_RANK", "0"))
        store, rank, size = next(iter(rendezvous("env://")))
        store.set_timeout(datetime.timedelta(minutes=_LATEST_MINUTES))
        store = PrefixStore(f"gradientspace {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _hide_launcher(local)
        ranks = cls(rank, size, store=store)
        store.set(f"member {rank}", json.dumps([socket.gethostname(), os.getpid()]))
        with ranks._watching():
            ranks.group = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(days=_PATIENCE_DAYS))
            ranks.members = [tuple(json.loads(store.get(f"member {r}"))) for r in range(size)]
        ranks._gone()  # imports what a signal's handler must not be the first to import
        signal.signal(signal.SIGTERM, lambda *_: ranks._terminated())
        if rank > 0:
            progress.silence()
        return ranks

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What rank 0 does; at the end the others stop, after an error with its exit code and wherever they are."""
        try:
            yield
        except BaseException as error:
            if self.size > 1:
                with contextlib.suppress(Exception):
                    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
                    self.store.set("end", str(code))
            raise
        self.broadcast(None)
        self.leave()

    def leave(self) -> None:
        """Close the group while Python still runs: threads of its own that outlive it would abort the process."""
        self.group = None
        gc.collect()

    def _end_of_leader(self) -> int | None:
        """The exit code with which rank 0 has left; None where it has not said any."""
        with contextlib.suppress(Exception):
            return int(self.store.get("end")) if self.store.check(["end"]) else None
        return None

    def first_to_say(self) -> bool:
        """Whether this rank is the first one that has something to say about the end: one line is enough."""
        try:
            return self.size == 1 or self.store.add("said", 1) == 1
        except Exception:  # the store was rank 0's and has gone with it
            return True

    def _lost(self, peer: int | None = None) -> str:
        """One line on who is lost; `peer` is the rank that did not answer, where that is known."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.05)
        gone = gone or ([] if peer is None else [peer])
        who = f"rank {', '.join(map(str, gone))} of {self.size}" if gone else "a rank on another machine"
        return f"{who} was lost: start the same command again, it goes on from what is finished"

    def _gone(self) -> list[int]:
        host = socket.gethostname()
        return [r for r, (where, pid) in enumerate(self.members) if where == host and not _runs(pid)]

    def _terminated(self) -> None:
        """SIGTERM: the launcher ends every rank once it has lost one, or was itself told to stop."""
        gone = self._gone()
        said = self._lost() if gone else "terminated; the same command continues where it stopped"
        if self._end_of_leader() is None and self.first_to_say():
            print(f"gradientspace: error: {said}", file=sys.stderr, flush=True)
        os._exit(1)  # wherever this rank was: a run folder survives that

    @contextlib.contextmanager
    def _watching(self, peer: int | None = None) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, EOFError) as error:  # gloo's and the store's
            if self.rank > 0 and (code := self._end_of_leader()) is not None:
                raise SystemExit(code) from error
            line = self._lost(peer)
            with contextlib.suppress(ValueError):  # outside the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing between taking the word and saying it
            raise LostRankError(line, told=not self.first_to_say()) from error

    def _broadcast(self, rows: Tensor, source: int) -> None:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with self._watching():
            self.group.broadcast([_as_bytes(rows)], options).wait()


@cache
def ranks() -> Ranks:
    """The processes of this run; found out once."""
    return Ranks.join() if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else Ranks()


def _hide_launcher(local: int) -> None:
    """From here on this is one ordinary process, with one device where the machine has several."""
    for name in [n for n in os.environ if n in _LAUNCHER or n.startswith("ACCELERATE_")]:
        del os.environ[name]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else None
    if devices is None:
        import torch

        devices = [str(i) for i in range(torch.cuda.device_count())]  # does not start CUDA
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]


def _runs(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _packed(value: Any) -> Tensor:
    import torch

    from gradientspace.messages import pack

    return torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)


def _as_bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every type of number."""
    import torch

    return rows.contiguous().view(-1).view(torch.uint8)
