"""Several samples in one row, with attention inside each sample only: no padding at all.

The row is passed with positions that start again at each sample, through an attention function that cuts
queries, keys and values at the sample boundaries. It is exact because everything else in these models works
token by token.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from gradientspace.device import on_device
from gradientspace.gradients.rows import equal_length_runs


def _varlen_attention() -> Any:
    """torch's flash attention over segments of different length, where it has one that knows windows and grouped
    queries; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


varlen_attn = _varlen_attention()

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
    segment_bounds: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment; query (1, heads, n, d), key and value (1, kv heads, n, d).

    `segment_bounds`: (b + 1,) int32, where the segments begin and the last one ends.
    """
    gqa = key.shape[1] != query.shape[1]
    if varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        # One kernel for all segments, whatever their lengths.
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (n, heads, d)
        left = -1 if sliding_window is None else sliding_window - 1
        bounds, longest = segment_bounds, max(segment_lengths)
        return varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=gqa
        )[None], None  # pyright: ignore[reportReturnType]
    outputs = []
    runs = equal_length_runs(segment_lengths)
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


def packed_inputs(input_ids: Tensor, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """The padded (b, T) rows as one row of sum(lengths) tokens on `device`, with what the model needs beside it."""
    row = torch.cat([ids[:n] for ids, n in zip(input_ids, lengths, strict=True)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    row, positions, bounds = on_device((row, positions, bounds), device)
    return {
        "input_ids": row[None],
        "position_ids": positions[None],
        "segment_lengths": tuple(lengths),
        "segment_bounds": bounds,
    }
