"""The HTTP routes. Who may come in is decided in `gate.py`, who answers in `routing.py`, how in a backend."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gradientspace.errors import DataError
from gradientspace.prompts import Prompt
from gradientspace.router import Router
from gradientspace.serving.backend import Backend, Call, Chunks, Reply
from gradientspace.serving.gate import Gate
from gradientspace.serving.metrics import CONTENT_TYPE, Metrics
from gradientspace.serving.openapi import OPENAPI_PATH, document
from gradientspace.serving.protocol import ApiError, ChatBody, CompletionBody, Kind, parse
from gradientspace.serving.routing import STICKY_HEADER, Route, RoutingService

_Result = TypeVar("_Result")

_PASSED_ON = ("x-request-id", "traceparent", "tracestate")
_CLOSED = 499
"""Status in the metrics for a client that went away, as nginx has it."""


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    max_body: int = 1 << 20
    """Bytes of a request's body (413)."""
    max_tokens: int = 4096
    """Tokens of an answer (400)."""
    max_requests: int = 256
    """Requests that run or wait at the same time (429)."""
    seconds: float = 300.0
    """From request to last byte (504)."""


def create_app(
    backend: Backend,
    router: Router,
    detokenise: Callable[[list[int]], str],
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    whole_conversation: bool = False,
) -> FastAPI:
    """The server as an ASGI app. `detokenise` turns a completion's token prompt into what the router reads."""
    server = Server(backend, router, detokenise, limits or Limits(), whole_conversation)
    app = FastAPI(
        lifespan=server.lifespan, docs_url=None, redoc_url=None, openapi_url=OPENAPI_PATH, redirect_slashes=False
    )
    app.openapi = document  # type: ignore[method-assign]
    app.state.server = server
    app.add_middleware(Gate, keys=keys, max_body=server.limits.max_body, metrics=server.metrics)  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, _error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(_Gone, _gone)
    app.add_exception_handler(Exception, _internal_error)
    for method, path, handler in (
        ("GET", "/health", server.health),
        ("GET", "/ready", server.readiness),
        ("GET", "/metrics", server.exposition),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name}", server.model),
        ("POST", "/v1/route", server.route),
        ("POST", "/v1/chat/completions", server.chat),
        ("POST", "/v1/completions", server.completion),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    return app


class Server:
    """The handlers and what they share."""

    def __init__(
        self,
        backend: Backend,
        router: Router,
        detokenise: Callable[[list[int]], str],
        limits: Limits,
        whole_conversation: bool,
    ) -> None:
        self.backend, self.detokenise, self.limits = backend, detokenise, limits
        self.metrics = Metrics()
        self.routing = RoutingService(router, backend.names, self.metrics, whole_conversation)
        self.running = 0
        self.is_ready = False
        self.metrics.queue.set_function(backend.waiting)
        self.metrics.running.set_function(lambda: self.running)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncGenerator[None, None]:
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    async def start(self) -> None:
        """Load and test everything. Raises where the self-test or an upstream fails."""
        await self.routing.start()
        await self.backend.start()
        self.is_ready = True

    async def stop(self) -> None:
        """Finish what runs."""
        self.is_ready = False
        await self.routing.close()
        await self.backend.close()

    # --------------------------------------------------------------------- small ones

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def readiness(self) -> Response:
        full = self.running >= self.limits.max_requests
        status = "ready" if self.is_ready and not full else "busy" if self.is_ready else "starting"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def exposition(self) -> Response:
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in ("auto", *self.backend.names)]}

    async def model(self, name: str) -> dict[str, Any]:
        await self.routing.choose(name if name != "auto" else "base", [""])  # 404 for an unknown one
        return _model(name)

    async def route(self, request: Request) -> dict[str, Any]:
        """The decision alone, for `prompt` (a text) or `messages`."""
        body = await _json(request)
        prompt = body.get("messages", body.get("prompt")) if isinstance(body, dict) else None
        if not isinstance(prompt, str | list) or not prompt:
            raise ApiError(400, "give `prompt`, a text, or `messages`, a conversation")
        (route,) = await self._choose("auto", [prompt], None)
        return {
            "expert": route.name,
            "probability": route.probability,
            "runner_up": route.runner_up,
            "reason": route.reason,
            "milliseconds": route.milliseconds,
        }

    # ------------------------------------------------------------------------ answers

    async def chat(self, request: Request) -> Response:
        return await self._answer("chat", request)

    async def completion(self, request: Request) -> Response:
        return await self._answer("completion", request)

    async def _answer(self, kind: Kind, request: Request) -> Response:
        start = time.monotonic()
        body = parse(kind, await _json(request))
        self._check(body)
        if self.running >= self.limits.max_requests:
            self.metrics.rejected.labels("429").inc()
            raise ApiError(429, f"{self.running} requests run or wait already, which is the limit: try again soon")
        self.running += 1
        track = _Tracked(self, start)
        try:
            async with asyncio.timeout(self.limits.seconds):
                routes = await _unless_gone(request, self._routes(body, request))
                track.routes = routes
                headers = {key: request.headers[key] for key in _PASSED_ON if key in request.headers}
                call = Call(kind, body, [route.name for route in routes], headers)
                reply = await _unless_gone(request, self._begin(call))
        except TimeoutError as error:
            track.finish(504)
            raise ApiError(504, f"no answer within {self.limits.seconds:g} s: ask for fewer tokens") from error
        except ApiError as error:
            track.finish(error.status)
            raise
        except BaseException as error:
            track.finish(_CLOSED if isinstance(error, asyncio.CancelledError | _Gone) else 500)
            raise
        if reply.chunks is None:
            track.count((reply.body or {}).get("usage"))
            track.finish(reply.status)
            return JSONResponse(reply.body, reply.status, _headers(routes))
        return _Stream(self._events(reply.chunks, body.include_usage, track), track, _headers(routes))

    def _check(self, body: ChatBody | CompletionBody) -> None:
        wanted = max(body.max_tokens or 0, (body.max_completion_tokens or 0) if isinstance(body, ChatBody) else 0)
        if wanted > self.limits.max_tokens:
            raise ApiError(
                400, f"max_tokens is {wanted}: this server answers with at most {self.limits.max_tokens}",
                param="max_tokens",
            )  # fmt: skip

    async def _routes(self, body: ChatBody | CompletionBody, request: Request) -> list[Route]:
        prompts: list[Prompt]
        if isinstance(body, ChatBody):
            prompts = [body.conversation]
        else:
            prompts = [p if isinstance(p, str) else self._text(p) for p in body.prompts]
        return await self._choose(body.model, prompts, request.headers.get(STICKY_HEADER))

    def _text(self, prompt: list[int]) -> str:
        try:
            return self.detokenise(prompt)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise ApiError(400, "prompt: a token is none of this model's", param="prompt") from error

    async def _choose(self, model: str, prompts: Sequence[Prompt], sticky: str | None) -> list[Route]:
        try:
            return await self.routing.choose(model, prompts, sticky)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from error

    async def _begin(self, call: Call) -> Reply:
        """An answer, or a stream whose first chunk is there: until then an error still has a status of its own."""
        reply = await self.backend.answer(call)
        if reply.chunks is None:
            return reply
        first = await anext(reply.chunks, None)
        if first is None:
            raise ApiError(502, "the engine ended its answer before it began")
        return Reply(chunks=_put_back(first, reply.chunks))

    async def _events(self, chunks: Chunks, include_usage: bool, track: _Tracked) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Once a stream has begun, an error is its last event."""
        status = 200
        try:
            left = max(0.0, track.start + self.limits.seconds - time.monotonic())
            async with asyncio.timeout(left), contextlib.aclosing(chunks):
                async for chunk in chunks:
                    track.count(chunk.get("usage"))
                    if chunk.get("usage") and not chunk.get("choices") and not include_usage:
                        continue
                    track.first_token(chunk)
                    yield _event(chunk)
        except TimeoutError:
            status = 504
            yield _event(ApiError(504, f"the answer took over {self.limits.seconds:g} s").body())
        except ApiError as error:
            status = error.status
            yield _event(error.body())
        except Exception as error:
            status = 500
            yield _event(ApiError(500, f"the answer broke off: {type(error).__name__}").body())
        yield b"data: [DONE]\n\n"
        track.finish(status)


class _Tracked:
    """One accepted request: what the metrics say of it, exactly once, however it ends."""

    def __init__(self, server: Server, start: float) -> None:
        self.server, self.start = server, start
        self.routes: list[Route] = []
        self.done = self.saw_token = False

    @property
    def model(self) -> str:
        return self.routes[0].name if self.routes else "none"

    def count(self, usage: dict[str, int] | None) -> None:
        for kind in ("prompt", "completion"):
            self.server.metrics.tokens.labels(self.model, kind).inc((usage or {}).get(f"{kind}_tokens", 0))

    def first_token(self, chunk: dict[str, Any]) -> None:
        parts = [
            (c.get("text") or c.get("delta", {}).get("content"), c.get("finish_reason"))
            for c in chunk.get("choices", [])
        ]
        if not self.saw_token and any(text or reason for text, reason in parts):
            self.saw_token = True
            self.server.metrics.first_token.labels(self.model).observe(time.monotonic() - self.start)

    def finish(self, status: int) -> None:
        if self.done:
            return
        self.done = True
        self.server.running -= 1
        metrics = self.server.metrics
        reason = self.routes[0].reason if self.routes else "none"
        metrics.requests.labels(self.model, reason, str(status)).inc()
        metrics.seconds.labels(self.model).observe(time.monotonic() - self.start)


async def _put_back(first: dict[str, Any], rest: Chunks) -> Chunks:
    """A stream whose first item was already taken, whole again."""
    async with contextlib.aclosing(rest):
        yield first
        async for item in rest:
            yield item


class _Stream(StreamingResponse):
    """A stream that gives its place back and stops the engine when it ends or its client goes away."""

    def __init__(self, events: AsyncGenerator[bytes, None], track: _Tracked, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self.track = track

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            self.track.finish(_CLOSED)


class _Gone(Exception):
    """The client closed the connection."""


async def _unless_gone(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Gone
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> Any:
    body = await request.body()
    try:
        # Not json.loads(body): it would take UTF-16, and halves of surrogate pairs, which no tokenizer takes.
        value = json.loads(body.decode())
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in valid Unicode") from error
    return value


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "gradientspace"}


def _headers(routes: Sequence[Route]) -> dict[str, str]:
    """The route's headers; those of several prompts' routes in one, by commas."""
    each = [route.headers() for route in routes]
    return {key: ",".join(headers.get(key, "") for headers in each) for key in each[0]}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


async def _error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = await _error(request, ApiError(error.status_code, str(error.detail)))
    answer.headers.update(error.headers or {})  # 405 says which methods there are
    return answer


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLOSED)  # nobody reads it


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _error(request, ApiError(500, f"internal error: {type(error).__name__}"))
