"""Which model answers a request: named by the client, or chosen by the router off the event loop, in micro-batches.

Nothing is kept between requests that could make two replicas disagree. A conversation stays with one expert because
what is routed is its opening, the turns up to the first one of the user, which every later request repeats; a client
that wants to stay with an expert whatever the opening says sends the name back in the header `x-gradientspace-expert`.
Decisions are remembered by a hash of the text, only to save time: forgetting one changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from gradientspace.inference import REFUSED, RouteDecision, decide, expert_name
from gradientspace.prompts import Prompt, opening, routing_text
from gradientspace.router import Router
from gradientspace.serving.metrics import Metrics
from gradientspace.serving.protocol import ApiError

STICKY_HEADER = "x-gradientspace-expert"

_MAX_BATCH = 16
_REMEMBERED = 10_000

Reason = Literal["routed", "fallback", "sticky", "named", "base"]


@dataclass(frozen=True)
class Route:
    """Who answers one prompt, and why."""

    name: str
    reason: Reason
    milliseconds: float = 0.0
    probability: float | None = None
    """The router's probability of its best expert; `None` where it was not asked."""
    runner_up: str | None = None

    def headers(self) -> dict[str, str]:
        values = {
            "expert": self.name,
            "reason": self.reason,
            "milliseconds": f"{self.milliseconds:.2f}",
            "probability": None if self.probability is None else f"{self.probability:.4f}",
            "runner-up": self.runner_up,
        }
        return {f"x-gradientspace-{key}": value for key, value in values.items() if value is not None}


class RoutingService:
    """`names`: what can answer. `whole_conversation`: route on all user turns anew, instead of on the opening."""

    def __init__(self, router: Router, names: Sequence[str], metrics: Metrics, whole_conversation: bool) -> None:
        self.router, self.names, self.metrics = router, list(names), metrics
        self.whole_conversation = whole_conversation
        self._waiting: asyncio.Queue[tuple[str, asyncio.Future[RouteDecision]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._decisions: OrderedDict[bytes, RouteDecision] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the encoder, so that the first request does not wait for it, and begin."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._decide, ["warm up"] * _MAX_BATCH)
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown()

    async def choose(self, model: str, prompts: Sequence[Prompt], sticky: str | None = None) -> list[Route]:
        """One route for every prompt. Raises `ApiError` 404 for an unknown model, 422 where the router refuses."""
        if model != "auto":
            name = self._known(model)
            return [Route(name, "base" if name == "base" else "named")] * len(prompts)
        if sticky is not None:
            return [Route(self._known(sticky), "sticky")] * len(prompts)
        start = time.perf_counter()
        decisions = await asyncio.gather(*(self._decision(prompt) for prompt in prompts))
        seconds = time.perf_counter() - start
        self.metrics.routing.observe(seconds)
        return [self._route(decision, 1000 * seconds) for decision in decisions]

    def _known(self, name: str) -> str:
        if name not in self.names:
            valid = ", ".join(["auto", *self.names])
            raise ApiError(
                404, f"the model {name!r} does not exist; there are {valid}", code="model_not_found", param="model"
            )
        return name

    def _route(self, decision: RouteDecision, milliseconds: float) -> Route:
        name = decision.name
        if decision.fallback:
            self.metrics.fallbacks.labels(name).inc()
        if decision.expert == REFUSED:
            raise ApiError(
                422, f"the router is too unsure of this prompt (probability {decision.probability:.3f}): "
                f"name the model that should answer: {', '.join(self.names)}", code="unsure",
            )  # fmt: skip
        self.metrics.probability.labels(name).observe(decision.probability)
        runner_up = None if decision.runner_up is None else expert_name(decision.runner_up)
        reason: Reason = "fallback" if decision.fallback else "routed"
        return Route(name, reason, milliseconds, decision.probability, runner_up)

    async def _decision(self, prompt: Prompt) -> RouteDecision:
        text = routing_text(prompt if self.whole_conversation else opening(prompt))
        key = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if key not in self._decisions:
            future: asyncio.Future[RouteDecision] = asyncio.get_running_loop().create_future()
            self._waiting.put_nowait((text, future))
            self._decisions[key] = await future
            if len(self._decisions) > _REMEMBERED:
                self._decisions.popitem(last=False)
        return self._decisions[key]

    async def _work(self) -> None:
        """Whatever came in while the last batch was encoded is the next batch."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < _MAX_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            texts = [text for text, _ in batch]
            try:
                decisions = await loop.run_in_executor(self._thread, self._decide, texts)
            except Exception as error:  # each waiting request is told; the next batch gets its chance
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), decision in zip(batch, decisions, strict=True):
                if not future.done():  # the client may have gone
                    future.set_result(decision)

    def _decide(self, texts: list[str]) -> list[RouteDecision]:
        rows = self.router.predict_proba(texts)
        return [decide(row, self.router.threshold, self.router.fallback) for row in rows]
