"""Who may come in: an ASGI layer that checks the API key and the size of the body before anything is parsed."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradientspace.serving.metrics import Metrics
from gradientspace.serving.protocol import ApiError

OPEN_PATHS = ("/health", "/ready")
"""Answer without a key: load balancers ask them."""

_LONGEST_SIZE = 18
"""Digits of a content length."""


class Gate:
    """Wraps the app. With no `keys` everybody may come in; `max_body` is in bytes."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body: int, metrics: Metrics) -> None:
        self.app, self.max_body, self.metrics = app, max_body, metrics
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            await self._refuse(
                send, ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                               code="invalid_api_key"),
            )  # fmt: skip
            return
        size = headers.get(b"content-length", b"0")
        # Python reads no whole number of thousands of digits.
        if not size.isdigit() or len(size) > _LONGEST_SIZE or int(size) > self.max_body:
            await self._refuse(send, self._too_large())
            return
        await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """Count the bytes as they come: a chunked body names no length. The app answers with what is raised here."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise self._too_large()
            return message

        return counted

    def _knows(self, header: bytes) -> bool:
        if not self.keys:
            return True
        scheme, _, given = header.partition(b" ")
        # Every key is compared, each in constant time: how long it takes tells nothing about them.
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is over the limit of {self.max_body} bytes: send a shorter prompt")

    async def _refuse(self, send: Send, error: ApiError) -> None:
        self.metrics.rejected.labels(str(error.status)).inc()
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        # The rest of the body is not read, so the connection cannot serve another request.
        headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
