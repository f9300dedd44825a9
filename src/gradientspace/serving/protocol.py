"""The shapes of OpenAI's chat and text completions, as the official client sends and reads them."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradientspace.errors import readable

Kind = Literal["chat", "completion"]

_MOST_ROWS = 1024
"""Answers of one request. A body of a megabyte could otherwise ask for millions."""
_OBJECTS = {"chat": "chat.completion", "completion": "text_completion"}


class ApiError(Exception):
    """An error the client is told of, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {"retry-after": "1"} if status == 429 else {}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": readable(str(self)), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Body(BaseModel):
    """What chat and text completions share. Other fields are kept: an engine upstream may know them."""

    model_config = ConfigDict(extra="allow")

    model: str = "auto"
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class ChatBody(_Body):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Role and content alone."""
        return [{"role": turn.role, "content": turn.content} for turn in self.messages]


class CompletionBody(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


def parse(kind: Kind, body: Any) -> ChatBody | CompletionBody:
    """A checked request. Raises `ApiError` 400 that names the field."""
    try:
        parsed = (ChatBody if kind == "chat" else CompletionBody).model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if not isinstance(part, int)) or "body"
        raise ApiError(400, f"{field}: {first['msg']}", param=field) from error
    prompts = 1 if isinstance(parsed, ChatBody) else len(parsed.prompts)
    if not 1 <= prompts * parsed.n <= _MOST_ROWS:
        raise ApiError(
            400, f"{prompts} prompts with n = {parsed.n}: a request asks for 1 to {_MOST_ROWS} answers", param="prompt"
        )
    return parsed


# ------------------------------------------------------------------------ answers


def new_id(kind: Kind) -> str:
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"


def answer(kind: Kind, answer_id: str, model: str, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict:
    """A whole answer."""
    head = {"id": answer_id, "object": _OBJECTS[kind], "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage}


def chunk(kind: Kind, answer_id: str, model: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One event of a stream."""
    name = _OBJECTS[kind] + (".chunk" if kind == "chat" else "")
    head = {"id": answer_id, "object": name, "created": int(time.time()), "model": model}
    return {**head, "choices": choices, **more}


def choice(kind: Kind, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A finished choice of a whole answer."""
    content = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def delta(kind: Kind, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A choice's part of one event."""
    content = {"delta": {"content": text} if text else {}} if kind == "chat" else {"text": text}
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
