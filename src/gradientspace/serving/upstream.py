"""The proxy: requests go on to an engine that holds the adapters (vLLM, SGLang), under the name of their expert.

Bodies pass through as they are, but for the model's name, so that whatever the engine knows works; its errors come
back with their status. The proxy keeps no state.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from gradientspace.errors import InputError
from gradientspace.serving.backend import Call, Chunks, Reply
from gradientspace.serving.parity import ASKED, WRITTEN, Fingerprint, Fingerprints, check_upstream
from gradientspace.serving.protocol import ApiError, CompletionBody

_PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


class UpstreamError(InputError):
    """The upstream does not answer, or does not serve what it should."""


class UpstreamBackend:
    """`url`: with or without `/v1`. `names`: ours; `upstream_name` turns one into the engine's.

    `canaries`, `expected`: token ids and fingerprints of the self-test. `transport`: for tests.
    """

    def __init__(
        self,
        url: str,
        names: Sequence[str],
        canaries: Sequence[list[int]],
        expected: Fingerprints,
        *,
        upstream_name: Callable[[str], str] = str,
        api_key: str | None = None,
        tolerance: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.names, self.upstream_name = list(names), upstream_name
        self.canaries, self.expected, self.tolerance = list(canaries), expected, tolerance
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            # How long an answer may take is the app's limit; only a connection must come soon.
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            transport=transport,
        )

    async def start(self) -> None:
        await self._check_names()
        await check_upstream(self._fingerprint, self.canaries, self.expected, self.tolerance)

    def waiting(self) -> int:
        return 0  # whatever comes in is handed on; the engine queues

    async def close(self) -> None:
        await self._client.aclose()

    async def answer(self, call: Call) -> Reply:
        """One upstream request for each expert that a call's prompts go to."""
        groups = {name: [i for i, other in enumerate(call.names) if other == name] for name in call.names}
        responses = await _all_or_none([self._send(call, name, rows) for name, rows in groups.items()])
        failed = next((response for response in responses if response.status_code != 200), None)
        if failed is not None or not call.body.stream:
            try:
                bodies = [await _read_json(r) for r in ([failed] if failed else responses)]
            finally:
                await asyncio.gather(*(response.aclose() for response in responses))
            if failed is not None:
                return Reply(body=bodies[0], status=failed.status_code)
            for body, (name, rows) in zip(bodies, groups.items(), strict=True):
                _rename(body, name, call, rows)
            return Reply(body=_join(bodies))
        parts = zip(responses, groups.items(), strict=True)
        return Reply(chunks=_merge([self._events(response, call, name, rows) for response, (name, rows) in parts]))

    async def _events(self, response: httpx.Response, call: Call, name: str, rows: Sequence[int]) -> Chunks:
        try:
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" not in event:
                    _rename(event, name, call, rows)
                yield event
        except (httpx.TransportError, ValueError) as error:
            raise ApiError(502, f"the upstream broke off its answer: {error or type(error).__name__}") from error
        finally:
            await response.aclose()  # closing the connection tells the engine to stop

    async def _send(self, call: Call, name: str, rows: Sequence[int]) -> httpx.Response:
        body: dict[str, Any] = call.body.model_dump(exclude_unset=True) | {"model": self.upstream_name(name)}
        if isinstance(call.body, CompletionBody) and len(call.names) > 1:
            body["prompt"] = [call.body.prompts[i] for i in rows]
        if call.body.stream:
            body["stream_options"] = (body.get("stream_options") or {}) | {"include_usage": True}
        request = self._client.build_request("POST", _PATHS[call.kind], json=body, headers=call.headers)
        try:
            return await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise ApiError(502, f"the upstream {self.url} does not answer: {error or type(error).__name__}") from error

    async def _check_names(self) -> None:
        """Whether the engine lists every name. Raises `UpstreamError`."""
        try:
            response = await self._client.get("/v1/models")
            response.raise_for_status()
            served = {entry["id"] for entry in response.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UpstreamError(f"the upstream {self.url} does not list its models: {error}") from error
        missing = [self.upstream_name(name) for name in self.names if self.upstream_name(name) not in served]
        if missing:
            raise UpstreamError(
                f"the upstream {self.url} does not serve {', '.join(missing)}; it serves {', '.join(sorted(served))}"
            )

    async def _fingerprint(self, name: str, canary: list[int]) -> Fingerprint:
        body = {
            "model": self.upstream_name(name), "prompt": canary, "temperature": 0, "logprobs": ASKED,
            "max_tokens": WRITTEN, "ignore_eos": True,
        }  # fmt: skip
        try:
            response = await self._client.post("/v1/completions", json=body)
            response.raise_for_status()
            logprobs = response.json()["choices"][0]["logprobs"]
            return Fingerprint(list(logprobs["tokens"]), [dict(top) for top in logprobs["top_logprobs"]])
        except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UpstreamError(f"the upstream {self.url} cannot be tested for parity: {error}") from error


async def _all_or_none(requests: Sequence[Coroutine[Any, Any, httpx.Response]]) -> list[httpx.Response]:
    """All responses; where one request fails, those that came are closed."""
    results = await asyncio.gather(*requests, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    responses = [result for result in results if isinstance(result, httpx.Response)]
    if errors:
        await asyncio.gather(*(response.aclose() for response in responses))
        raise errors[0]
    return responses


async def _read_json(response: httpx.Response) -> dict[str, Any]:
    try:
        return json.loads(await response.aread())
    except (httpx.TransportError, ValueError) as error:
        raise ApiError(502, f"the upstream answered with status {response.status_code} and no JSON") from error


def _rename(body: dict[str, Any], name: str, call: Call, rows: Sequence[int]) -> None:
    """Our name for the model; and the client's numbers of the choices, where the engine saw part of the prompts."""
    body["model"], n = name, call.body.n
    for choice in body.get("choices", []):
        choice["index"] = rows[choice["index"] // n] * n + choice["index"] % n


def _join(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = bodies[0]
    if len(bodies) == 1:
        return first
    choices = sorted((choice for body in bodies for choice in body["choices"]), key=lambda choice: choice["index"])
    names = ",".join(body["model"] for body in bodies)
    return first | {"choices": choices, "model": names, "usage": _sum_usage([body["usage"] for body in bodies])}


async def _merge(streams: Sequence[Chunks]) -> Chunks:
    """The chunks of several streams as they come, and one sum of their usages at the end."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield event
        return
    arrived: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

    async def forward(stream: Chunks) -> None:
        try:
            async for event in stream:
                arrived.put_nowait(event)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    usages, last = [], {}
    try:
        left = len(tasks)
        while left:
            event = await arrived.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            elif event.get("usage") and not event.get("choices"):
                usages.append(event["usage"])
                last = event
            else:
                yield event
        yield last | {"usage": _sum_usage(usages)}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sum_usage(usages: Sequence[dict[str, Any]]) -> dict[str, int]:
    keys = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {key: sum(usage.get(key, 0) for usage in usages) for key in keys}
