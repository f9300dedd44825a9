"""Answer with all adapters at once, their logits averaged: what ensembles cost and gain beside one routed expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gradientspace.data import Sample, pad_batch
from gradientspace.inference import Experts, mean_losses
from gradientspace.progress import Progress


@torch.inference_mode()
def ensemble_losses(
    experts: Experts,
    samples: Sequence[Sample],
    mixtures: Sequence[np.ndarray],
    *,
    batch_size: int,
    pad_token_id: int,
    alone: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean completion-token cross-entropy (n, M) of M mixtures of the E adapters' logits, from one pass an adapter.

    A mixture is (n, E), one row of weights a sample, each summing to one. With `alone` also the losses (n, E) of every
    adapter by itself, which the same passes tell; (n, 0) without.
    """
    n, e = len(samples), len(experts.names)
    mixed, single = np.zeros((n, len(mixtures))), np.zeros((n, e if alone else 0))
    with Progress("ensemble losses", n, "sample") as progress:
        lengths = [len(s.input_ids) for s in samples]
        longest = max(lengths, default=0)
        for rows in _batches(lengths, batch_size):
            batch = pad_batch([samples[i] for i in rows], pad_token_id, longest=longest)
            totals = [torch.zeros(1)] * len(mixtures)
            for k in range(e):
                logits, where = experts.supervised_logits(k, batch)
                if alone:
                    single[rows, k] = mean_losses(logits, where)
                for m, weights in enumerate(mixtures):
                    own = torch.as_tensor(weights[rows, k]).to(logits)[where.samples]
                    totals[m] = totals[m].to(logits) + logits * own[:, None]
            for m, total in enumerate(totals):
                mixed[rows, m] = mean_losses(total, where)
            progress.advance(len(rows))
    return mixed, single


@torch.inference_mode()
def ensemble_answers(
    experts: Experts,
    prompts: Sequence[list[int]],
    weights: np.ndarray,
    *,
    batch_size: int,
    pad_token_id: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """Greedy answers, token by token, of averaged logits; each without its stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    with Progress("ensemble answers", len(prompts), "prompt") as progress:
        for rows in _batches([len(p) for p in prompts], batch_size):
            decoder = _Decoder(experts, [prompts[i] for i in rows], weights[rows], pad_token_id)
            running = set(rows)
            for _ in range(max_new_tokens):
                for i, token in zip(rows, decoder.step(), strict=True):
                    if i in running and token in stop_ids:
                        running.remove(i)
                    elif i in running:
                        answers[i].append(token)
                if not running:
                    break
            progress.advance(len(rows))
    return answers


class _Decoder:
    """One batch of left-padded prompts with a cache for every adapter."""

    def __init__(self, experts: Experts, prompts: Sequence[list[int]], weights: np.ndarray, pad_token_id: int) -> None:
        width, device = max(len(p) for p in prompts), experts.base.device
        self.experts, self.weights = experts, torch.as_tensor(weights)
        self.ids = torch.tensor([[pad_token_id] * (width - len(p)) + p for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.caches: list[object] = [None] * len(experts.names)

    def step(self) -> list[int]:
        """The next token of every prompt."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        total = torch.zeros(1)
        for k in range(len(self.caches)):
            with self.experts.active(k) as model:
                output = model(
                    input_ids=self.ids, attention_mask=self.mask, position_ids=positions,
                    cache=self.caches[k], use_cache=True,
                )  # fmt: skip
            self.caches[k] = output.cache
            logits = output.logits[:, -1].float()
            total = total.to(logits) + logits * self.weights[:, k, None].to(logits)
        self.ids = total.argmax(dim=1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)
        return self.ids[:, 0].tolist()


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
