"""What a backend is: something that answers a checked request whose expert is already chosen."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from gradientspace.serving.protocol import ChatBody, CompletionBody, Kind

Chunks = AsyncGenerator[dict[str, Any], None]
"""Events of a stream, in OpenAI's form."""


@dataclass(frozen=True)
class Call:
    """One request. `names[i]` answers prompt i; a chat has one prompt."""

    kind: Kind
    body: ChatBody | CompletionBody
    names: list[str]
    headers: dict[str, str] = field(default_factory=dict)
    """The client's headers that an upstream may want to see: request id and tracing."""


@dataclass(frozen=True)
class Reply:
    """An answer in OpenAI's form: `body` at once, or `chunks` as they are made.

    A stream always ends with a chunk that has `usage`; the app drops it for clients that did not ask.
    """

    body: dict[str, Any] | None = None
    chunks: Chunks | None = None
    status: int = 200
    """Other than 200: an upstream's error, passed on with its body."""


class Backend(Protocol):
    """The two ways to answer: `gradientspace.serving.local` and `gradientspace.serving.upstream`."""

    names: list[str]
    """What can answer: experts, the shared adapter where there is one, the base."""

    async def start(self) -> None:
        """Make ready and run the self-test. Raises `ParityError` where it fails."""
        ...

    async def answer(self, call: Call) -> Reply:
        """Answer, or begin to. Cancelling the task, or closing the stream, stops the work."""
        ...

    def waiting(self) -> int:
        """Requests that no engine works on yet."""
        ...

    async def close(self) -> None:
        """Finish what is running, then stop."""
        ...
