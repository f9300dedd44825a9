"""The built-in backend: requests wait in a queue, a thread answers them in micro-batches over stacked experts.

A batch takes what waits, up to `max_batch` rows whatever their experts, and runs until its rows have ended; then comes
the next. There is no continuous batching here: engines do that, behind `--upstream`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gradientspace.generation import Piece, Request, generate
from gradientspace.inference import RoutedModel
from gradientspace.serving.backend import Call, Reply
from gradientspace.serving.parity import check_stacked
from gradientspace.serving.translate import Answer, requests_of


@dataclass
class _Job:
    """A row in the queue, and where its pieces go. `error` ends it in place of a piece."""

    request: Request
    put: Callable[[Piece | Exception], None]
    cancelled: bool = False


class LocalBackend:
    """`expected`: `parity.plain_logits` of the model's base and adapters, which the self-test compares with.

    `max_batch`: rows of one batch; `wait`: seconds a first row waits for others to join it; `default_tokens`: longest
    answer where the client names no limit.
    """

    def __init__(
        self,
        model: RoutedModel,
        expected: Mapping[str, torch.Tensor],
        max_batch: int = 32,
        wait: float = 0.004,
        default_tokens: int = 256,
    ) -> None:
        self.model, self.expected = model, expected
        self.max_batch, self.wait, self.default_tokens = max_batch, wait, default_tokens
        self.names = model.names
        self._queue: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    async def start(self) -> None:
        await asyncio.to_thread(check_stacked, self.model, self.expected)
        self._thread.start()

    def waiting(self) -> int:
        return self._queue.qsize()

    async def close(self) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def answer(self, call: Call) -> Reply:
        requests = requests_of(call, self.model, self.default_tokens)
        answer = Answer(call, requests, self.model.tokenizer)
        pieces = self._submit(requests)
        return Reply(chunks=answer.chunks(pieces)) if call.body.stream else Reply(body=await answer.whole(pieces))

    async def _submit(self, requests: Sequence[Request]) -> AsyncGenerator[Piece, None]:
        """The pieces of all rows as they are made, `row` being the place in `requests`."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        def sender(row: int) -> Callable[[Piece | Exception], None]:
            return lambda piece: _call_in(loop, pieces.put_nowait, (row, piece))

        jobs = [_Job(request, sender(row)) for row, request in enumerate(requests)]
        for job in jobs:
            self._queue.put(job)
        left = len(jobs)
        try:
            while left:
                row, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish_reason is not None
                yield replace(piece, row=row)
        finally:
            for job in jobs:  # the client went away, or one row failed
                job.cancelled = True

    def _work(self) -> None:
        while True:
            jobs, last = self._next_batch()
            if jobs:
                self._run(jobs)
            if last:
                return

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """What waits, and whether the server is closing."""
        jobs: list[_Job] = []
        deadline = None
        while len(jobs) < self.max_batch:
            try:
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                job = self._queue.get(timeout=timeout)
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            if not job.cancelled:
                jobs.append(job)
                deadline = deadline or time.monotonic() + self.wait
        return jobs, False

    def _run(self, jobs: list[_Job]) -> None:
        model = self.model
        try:
            for piece in generate(
                model.experts,
                [job.request for job in jobs],
                model.tokenizer,
                model.template.stop_ids,
                lambda row: jobs[row].cancelled,
            ):
                jobs[piece.row].put(piece)
        except Exception as error:  # out of memory, say: these requests fail, the server lives
            for job in jobs:
                job.put(error)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
