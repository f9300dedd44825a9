"""Several samples in one row, with attention inside each sample only: no padding at all.

The row is passed with positions that start again at each sample, through an attention function that cuts
queries, keys and values at the sample boundaries. It is exact because everything else in these models works
token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from gradientspace.gradients.rows import equal_length_runs

ATTENTION = "gradientspace_segments"

# Models whose attention is nothing but softmax(q k^T) v over one causal segment, each tested here.
PACKABLE = ("llama", "qwen3", "mistral", "gpt_neox")


def why_not_packable(causal_lm: Any, one_by_one: Collection[str]) -> str:
    """Empty when packing is exact for this model; `one_by_one` are modules that must see single samples."""
    kind = causal_lm.config.model_type
    if kind not in PACKABLE:
        return f"packing is shown to be exact for {', '.join(PACKABLE)} only, and this model is {kind}"
    if one_by_one:
        return "samples must pass one at a time where tokens are regrouped"
    return ""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    segment_lengths: tuple[int, ...],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment; query (1, heads, n, d), key and value (1, kv heads, n, d)."""
    outputs = []
    runs = equal_length_runs(segment_lengths)
    gqa = key.shape[1] != query.shape[1]
    # split, not slices: its backward pass concatenates once instead of adding n-long zero-filled tensors
    parts = (tensor[0].split([c * n for c, n in runs], dim=1) for tensor in (query, key, value))
    for (count, n), *own in zip(runs, *parts, strict=True):
        q, k, v = (part.unflatten(1, (count, n)).transpose(0, 1) for part in own)  # (count, heads, n, d)
        mask = None
        if sliding_window is not None and n > sliding_window:
            distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
            mask = (distance >= 0) & (distance < sliding_window)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(ATTENTION, segment_attention)


@contextmanager
def segment_attention_in(causal_lm: Any) -> Iterator[None]:
    """Every attention layer of the model uses `segment_attention`."""
    config = causal_lm.config
    before = config._attn_implementation
    try:
        config._attn_implementation = ATTENTION
        yield
    finally:
        config._attn_implementation = before


def packed_inputs(input_ids: Tensor, lengths: list[int]) -> dict[str, Any]:
    """The padded (b, T) rows as one row of sum(lengths) tokens, with what the model needs beside it."""
    device = input_ids.device
    row = torch.cat([ids[:n] for ids, n in zip(input_ids, lengths, strict=True)])
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    return {
        "input_ids": row[None],
        "position_ids": positions[None],
        "segment_lengths": tuple(lengths),
    }
