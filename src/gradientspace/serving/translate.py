"""Between OpenAI's requests and answers and the rows of the built-in backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from gradientspace.errors import DataError
from gradientspace.generation import Piece, Request, TokenLogprob, context_length
from gradientspace.inference import RoutedModel
from gradientspace.serving.backend import Call, Chunks
from gradientspace.serving.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    Kind,
    answer,
    choice,
    chunk,
    delta,
    new_id,
    usage_of,
)

_UNSUPPORTED = (
    "tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty", "best_of", "suffix", "audio",
    "min_p",
)  # fmt: skip
"""Fields that would change the answer: refused rather than ignored. An engine behind `--upstream` may know them."""


def requests_of(call: Call, model: RoutedModel, default_tokens: int) -> list[Request]:
    """The rows of a call: prompt 0's n choices, then prompt 1's, …"""
    body = call.body
    for name in _UNSUPPORTED:
        if (body.model_extra or {}).get(name) not in (None, [], {}, 0, 0.0):
            raise ApiError(400, f"{name} is not supported by the built-in backend: leave it out", param=name)
    prompts, options = _chat(body, model) if isinstance(body, ChatBody) else _completion(body, model)
    rows = []
    for prompt, name in zip(prompts, call.names, strict=True):
        row = Request(
            prompt=prompt,
            expert=model.row(name),
            max_new_tokens=_room(prompt, body, model, default_tokens),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            stop=body.stops,
            ignore_end=body.ignore_eos,
            **options,
        )
        rows += [replace(row, seed=None if body.seed is None else body.seed + i) for i in range(body.n)]
    return rows


def _chat(body: ChatBody, model: RoutedModel) -> tuple[list[list[int]], dict[str, Any]]:
    turns = [{"role": _role(turn["role"]), "content": _text(turn["content"])} for turn in body.conversation]
    if turns[-1]["role"] == "assistant":
        raise ApiError(400, "the last message is the assistant's: end with the user's", param="messages")
    try:
        prompt = model.template.prompt_ids(turns)
    except DataError as error:
        raise ApiError(400, str(error), param="messages") from error
    return [prompt], {"n_logprobs": (body.top_logprobs or 0) if body.logprobs else None}


def _completion(body: CompletionBody, model: RoutedModel) -> tuple[list[list[int]], dict[str, Any]]:
    size = len(model.tokenizer)
    prompts = []
    for prompt in body.prompts:
        ids = model.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids or not all(0 <= token < size for token in ids):
            raise ApiError(400, f"a prompt needs at least one token, each between 0 and {size - 1}", param="prompt")
        prompts.append(ids)
    echoes = body.echo and body.logprobs is not None
    return prompts, {"n_logprobs": body.logprobs, "prompt_logprobs": echoes}


def _role(role: str) -> str:
    if role in ("tool", "function"):
        raise ApiError(400, f"messages of role {role!r} are not supported by the built-in backend", param="messages")
    return "system" if role == "developer" else role


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ApiError(400, "only text parts are supported: this model reads no images or sound", param="messages")
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""


def _room(prompt: Sequence[int], body: ChatBody | CompletionBody, model: RoutedModel, default_tokens: int) -> int:
    """How many tokens the answer may have. Raises `ApiError` 400 where prompt and answer do not fit the context."""
    wanted = body.max_completion_tokens if isinstance(body, ChatBody) else None
    wanted = body.max_tokens if wanted is None else wanted
    limit = context_length(model.experts.model.config)
    room = None if limit is None else limit - len(prompt)
    if room is not None and (room < 1 or (wanted or 0) > room):
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens and the answer may have {wanted or default_tokens}: together over "
            f"the model's context of {limit}",
            code="context_length_exceeded",
        )
    return wanted if wanted is not None else min(default_tokens, room or default_tokens)


# ------------------------------------------------------------------ pieces -> answer


@dataclass
class _Row:
    text: str = ""
    reason: str | None = None
    tokens: list[TokenLogprob] = field(default_factory=list)


class Answer:
    """The rows of one call on their way back into OpenAI's form, at once (`whole`) or as a stream (`chunks`)."""

    def __init__(self, call: Call, requests: Sequence[Request], tokenizer: Any) -> None:
        self.call, self.requests, self.tokenizer = call, requests, tokenizer
        self.kind: Kind = call.kind
        self.id = new_id(call.kind)
        self.model = ",".join(dict.fromkeys(call.names))
        self.usage = usage_of(sum(len(request.prompt) for request in requests[:: call.body.n]), 0)

    async def whole(self, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
        rows = [_Row(text=self._echo(i)) for i in range(len(self.requests))]
        async with aclosing(pieces):
            async for piece in pieces:
                row = rows[piece.row]
                row.text += piece.text
                row.tokens += piece.prompt_logprobs + piece.logprobs
                row.reason = piece.finish_reason
                self._count(piece)
        choices = [
            choice(self.kind, i, row.text, row.reason, self._logprobs(row.tokens, i)) for i, row in enumerate(rows)
        ]
        return answer(self.kind, self.id, self.model, choices, self.usage)

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> Chunks:
        started: set[int] = set()
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.row not in started:
                    started.add(piece.row)
                    for opening in self._opening(piece.row):
                        yield self._chunk([opening])
                self._count(piece)
                tokens = piece.prompt_logprobs + piece.logprobs
                if piece.text or tokens or piece.finish_reason:
                    logprobs = self._logprobs(tokens, piece.row)
                    yield self._chunk([delta(self.kind, piece.row, piece.text, piece.finish_reason, logprobs)])
        yield self._chunk([], usage=self.usage)

    def _opening(self, row: int) -> list[dict[str, Any]]:
        if self.kind == "chat":
            role = {"role": "assistant", "content": ""}
            return [{"index": row, "delta": role, "logprobs": None, "finish_reason": None}]
        return [delta(self.kind, row, self._echo(row), None, None)] if self._echo(row) else []

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return chunk(self.kind, self.id, self.model, choices, **more)

    def _count(self, piece: Piece) -> None:
        self.usage["completion_tokens"] += piece.n_tokens
        self.usage["total_tokens"] += piece.n_tokens

    def _echo(self, row: int) -> str:
        body = self.call.body
        if not isinstance(body, CompletionBody) or not body.echo:
            return ""
        prompt = body.prompts[row // body.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _logprobs(self, tokens: list[TokenLogprob], row: int) -> dict[str, Any] | None:
        if self.requests[row].n_logprobs is None:
            return None
        show = _chat_logprobs if self.kind == "chat" else _completion_logprobs
        return show(tokens, lambda token: self.tokenizer.decode([token]))


def _chat_logprobs(tokens: list[TokenLogprob], text: Callable[[int], str]) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": text(token), "logprob": logprob, "bytes": list(text(token).encode())}

    return {
        "content": [
            {**entry(token.token, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
            for token in tokens
        ]
    }


def _completion_logprobs(tokens: list[TokenLogprob], text: Callable[[int], str]) -> dict[str, Any]:
    texts = [text(token.token) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {text(i): p for i, p in reversed(token.top)} for token in tokens
        ],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)),
    }
