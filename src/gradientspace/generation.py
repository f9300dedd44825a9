"""Answers for a micro-batch in which every row has its own expert, sampling and end: one forward pass a token.

    with StackedExperts(base, folders) as experts:
        for piece in generate(experts, requests, tokenizer, stop_ids):
            print(piece.row, piece.text, piece.finish_reason)

Prompts are padded on the left and read in one pass; then each step adds one token to every row that still runs, over
a key-value cache. A row that ends leaves the batch, so the others get faster. Rows do not influence each other: a
row's answer is the one it would get alone, up to the rounding of sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from gradientspace.errors import DataError
from gradientspace.models import padding_id
from gradientspace.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gradientspace.stacked import StackedExperts

_COLDEST = 1e-5
"""Below, a temperature is as good as greedy, and a quotient would leave float32's range."""
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One row: a prompt, its expert, and how to answer it. Greedy unless `temperature` is above zero."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    expert: int
    """Number of the expert, or `BASE`."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    seed: int | None = None
    """Seed of the row's own random numbers: the same answer whoever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    ignore_end: bool = False
    """Go on after an end token, to measure speed at a fixed length."""
    n_logprobs: int | None = None
    """Report each token's log-probability and this many alternatives."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens too (needs `n_logprobs`)."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability before temperature (`None` for a prompt's first), and the likeliest ones."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass
class Piece:
    """What one step adds to one row."""

    row: int
    text: str = ""
    n_tokens: int = 0
    """New tokens, an end token included."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def context_length(config: Any) -> int | None:
    """The longest prompt with answer that a model takes, in tokens; `None` where its config names none."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


@torch.inference_mode()
def generate(
    experts: StackedExperts,
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    is_cancelled: Callable[[int], bool] = lambda row: False,
) -> Iterator[Piece]:
    """Yield pieces as they are made; every row's last one has a `finish_reason`.

    `stop_ids`: tokens that end an answer. `is_cancelled(row)` is asked before every step. Raises `DataError` for an
    empty prompt, or one that leaves no room for `max_new_tokens`.
    """
    _check(experts, requests)
    rows = [_Row(i, request, tokenizer, stop_ids) for i, request in enumerate(requests)]
    with experts.batch([request.expert for request in requests]):
        batch = _Batch(experts, requests, padding_id(tokenizer))
        whole_prompt = any(request.prompt_logprobs for request in requests)
        logits = batch.read_prompts(whole_prompt)
        for place, row in enumerate(rows):
            if row.request.prompt_logprobs:
                yield Piece(row.number, prompt_logprobs=row.read_prompt(logits[place]))
        logits = logits[:, -1]
        while rows:
            tokens = _choose(logits, rows)
            running = []
            for place, row in enumerate(rows):
                if is_cancelled(row.number):
                    piece = Piece(row.number, finish_reason="cancelled")
                else:
                    piece = row.push(tokens[place], logits[place])
                if piece.finish_reason is None:
                    running.append(place)
                if piece.n_tokens or piece.finish_reason:
                    yield piece
            if len(running) < len(rows) and running:
                batch.keep(running)
            rows = [rows[place] for place in running]
            if rows:
                logits = batch.step([tokens[place] for place in running])


class _Batch:
    """The rows that still run: their experts, mask and key-value cache."""

    def __init__(self, experts: StackedExperts, requests: Sequence[Request], pad_token_id: int) -> None:
        from transformers import DynamicCache

        self.experts, self.model = experts, experts.model
        self.rows = [request.expert for request in requests]
        self.ids, self.mask = left_pad([request.prompt for request in requests], pad_token_id, self.model.device)
        self.cache = DynamicCache(config=self.model.config)
        accepted = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted

    def read_prompts(self, all_logits: bool) -> torch.Tensor:
        """(b, t, V) logits of whole prompts, or (b, 1, V) of their last tokens."""
        keep = {} if all_logits or not self._takes_logits_to_keep else {"logits_to_keep": 1}
        return self._forward(self.ids, (self.mask.cumsum(1) - 1).clamp_min(0), **keep)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """(b, V) logits after one more token a row."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        return self._forward(ids, self.mask.sum(1, keepdim=True) - 1)[:, -1]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        if self._takes_positions:
            options["position_ids"] = positions
        return self.model(
            input_ids=ids, attention_mask=self.mask, cache=self.cache, use_cache=True, **options
        ).logits.float()

    def keep(self, places: Sequence[int]) -> None:
        index = torch.tensor(places, device=self.mask.device)
        self.rows = [self.rows[place] for place in places]
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        self.experts.select(self.rows)


class _Row:
    """One row's tokens so far, as text, and when to stop."""

    def __init__(
        self, number: int, request: Request, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
    ) -> None:
        self.number, self.request = number, request
        self.stop_ids = () if request.ignore_end else frozenset(stop_ids)
        self.stream = TextStream(tokenizer, request.stop)
        self.n_tokens = 0
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)

    def push(self, token: int, logits: torch.Tensor) -> Piece:
        """Take the next token, whose logits (V,) are given."""
        if self.request.max_new_tokens == 0:
            return Piece(self.number, finish_reason="length")
        self.n_tokens += 1
        piece = Piece(self.number, n_tokens=1)
        if self.request.n_logprobs is not None:
            piece.logprobs = _token_logprobs(logits[None], [token], self.request.n_logprobs)
        if token in self.stop_ids:
            piece.text, piece.finish_reason = self.stream.finish(), "stop"
            return piece
        piece.text = self.stream.push(token)
        if self.stream.stopped:
            piece.finish_reason = "stop"
        elif self.n_tokens == self.request.max_new_tokens:
            piece.text, piece.finish_reason = piece.text + self.stream.finish(), "length"
        return piece

    def read_prompt(self, logits: torch.Tensor) -> list[TokenLogprob]:
        """The prompt's tokens under `logits` (t, V), of which the last belong to this row."""
        prompt = list(self.request.prompt)
        scored = _token_logprobs(logits[-len(prompt) : -1], prompt[1:], self.request.n_logprobs or 0)
        return [TokenLogprob(prompt[0], None, []), *scored]


def left_pad(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each (b, longest) int64, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _check(experts: StackedExperts, requests: Sequence[Request]) -> None:
    limit = context_length(experts.model.config)
    for request in requests:
        if not request.prompt:
            raise DataError("a prompt has no tokens: give at least one")
        length = len(request.prompt) + request.max_new_tokens
        if limit is not None and length > limit:
            raise DataError(
                f"a prompt of {len(request.prompt)} tokens and an answer of {request.max_new_tokens} are over the "
                f"model's context of {limit} tokens: shorten one of them"
            )


def _choose(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of every row from its logits (b, V)."""
    tokens = logits.argmax(dim=-1).tolist()
    for place, row in enumerate(rows):
        if row.request.temperature > 0:
            tokens[place] = _sample(logits[place].cpu(), row.request, row.generator)
    return tokens


def _sample(logits: torch.Tensor, request: Request, generator: torch.Generator) -> int:
    """Temperature, then top-k, then top-p, as transformers and vLLM order them. `logits`: (V,)."""
    logits = logits / max(request.temperature, _COLDEST)
    candidates = None
    if 0 < request.top_k < len(logits) or request.top_p < 1:
        logits, candidates = logits.sort(descending=True, stable=True)
        if request.top_k > 0:
            logits = logits[: request.top_k]
        probabilities = logits.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        before[0] = -1  # the likeliest token always stays, also where float32 has no number as small as top_p
        logits = logits[before < request.top_p]
    choice = int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))
    return choice if candidates is None else int(candidates[choice])


def _token_logprobs(logits: torch.Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """`logits`: (t, V), one row for each of `tokens`."""
    log_p = logits.log_softmax(dim=-1)
    own = log_p.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_p.topk(n_top, dim=-1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(token, p, top) for token, p, top in zip(tokens, own, tops, strict=True)]
