"""How one LoRA layer forms the gradients of its A and B for each sample.

For y = W x + s B A x and an upstream gradient g, with x_i, g_i the token rows of sample i,

    dA_i = (s g_i B)^T x_i     (r, in)
    dB_i = s g_i^T (x_i A^T)   (out, r)

One matrix product a sample and factor, so no summed parameter gradient is formed and no per-sample
gradient of W (out, in) either. Two autograd functions do this. `FusedLoraLinear` replaces the whole
forward of a plain PEFT LoRA layer (the fast path). `PerSampleLinear` replaces only the two small linears
inside a layer whose own forward we do not know, such as one over a quantised base (the general path).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradientspace.errors import ModelError
from gradientspace.gradients.rows import ConsecutiveRows, OneSampleRows, TokenRows


@dataclass(frozen=True, slots=True)
class Block:
    """Where one LoRA parameter lies in a gradient row: `row[offset : offset + size].view(shape)`."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class GradientSink:
    """Where layers write during a backward pass: a (b, D) matrix, and `rows`, the owners of the tokens.

    A layer takes `rows` down in its forward pass and hands it back in its backward pass, so it may change
    between layers.
    """

    def __init__(self) -> None:
        self.out: Tensor = torch.empty(0)
        self.rows: TokenRows = ConsecutiveRows(())
        self._written: set[int] = set()

    def open(self, out: Tensor, rows: TokenRows) -> None:
        self.out, self.rows = out, rows
        self._written = set()

    def close(self, layout: list[Block]) -> None:
        """Zero the blocks whose layer took no part in this pass, and let go of the matrix."""
        for block in layout:
            if block.offset not in self._written:
                self._target(block).zero_()
        self.out = torch.empty(0)

    def add_outer(self, block: Block, rows: TokenRows, left: Tensor, right: Tensor) -> None:
        """Add the sum of left_t right_t^T over each sample's rows; left (n, p), right (n, q)."""
        if not rows.fits(len(left)):
            raise ModelError(f"{block.name}: {len(left)} token rows do not fit {rows}; leave this layer out")
        rows.outer(left, right, self._target(block), add=self._seen(block))

    def add_sum(self, block: Block, rows: TokenRows, values: Tensor) -> None:
        """Add the sum of each sample's rows of `values` (n, p)."""
        rows.sum(values, self._target(block), add=self._seen(block))

    def _target(self, block: Block) -> Tensor:
        return self.out[:, block.offset : block.offset + block.size].view(-1, *block.shape)

    def _seen(self, block: Block) -> bool:
        """Whether the block was written before: a layer can run more than once in a forward pass."""
        seen = block.offset in self._written
        self._written.add(block.offset)
        return seen


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA layer as the autograd functions need it."""

    scaling: float
    a: Block
    b: Block
    bias: Block | None
    sink: GradientSink


class FusedLoraLinear(torch.autograd.Function):
    """y = W x + s B A x (+ biases), with per-sample gradients of A and B written to the sink.

    x (..., in), A (r, in), B (out, r), W (out, in). A and B are inputs so that the output requires a
    gradient even where x does not (the first layer); their own gradients are returned as None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        lora_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        spec: LoraSpec,
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        h = tokens.to(lora_a.dtype) @ lora_a.t()  # (n, r)
        merge = _merging_pays(tokens, weight, lora_a)
        if merge:
            out = F.linear(tokens, torch.addmm(weight, lora_b, lora_a, alpha=spec.scaling), bias)
        else:
            out = F.linear(tokens, weight, bias)
            if out.dtype == h.dtype:
                out.addmm_(h, lora_b.t(), alpha=spec.scaling)
            else:  # adapter kept in fp32 over a half-precision base: PEFT adds in fp32 and rounds once
                out = (out + (h @ lora_b.t()) * spec.scaling).to(out.dtype)
        if lora_bias is not None:
            out = (out + spec.scaling * lora_bias).to(out.dtype)
        ctx.save_for_backward(tokens, h, lora_a, lora_b, weight)
        ctx.spec, ctx.rows, ctx.merge, ctx.x_shape = spec, spec.sink.rows, merge, x.shape
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, h, lora_a, lora_b, weight = ctx.saved_tensors
        spec: LoraSpec = ctx.spec
        g = grad_outputs[0].reshape(-1, weight.shape[0])
        g_adapter = g.to(lora_a.dtype)
        dh = (g_adapter @ lora_b).mul_(spec.scaling)  # (n, r)
        spec.sink.add_outer(spec.a, ctx.rows, dh, tokens.to(lora_a.dtype))
        spec.sink.add_outer(spec.b, ctx.rows, g_adapter, h * spec.scaling)
        if spec.bias is not None:
            spec.sink.add_sum(spec.bias, ctx.rows, g_adapter * spec.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.merge:
                dx = g @ torch.addmm(weight, lora_b, lora_a, alpha=spec.scaling)
            else:
                dx = g @ weight
                if dx.dtype == dh.dtype:
                    dx.addmm_(dh, lora_a)
                else:
                    dx = (dx + dh @ lora_a).to(dx.dtype)
            dx = dx.view(ctx.x_shape)
        return dx, None, None, None, None, None, None


def _merging_pays(tokens: Tensor, weight: Tensor, lora_a: Tensor) -> bool:
    """Whether one product with W + s B A is cheaper than two products and a sum.

    Forming the sum costs a pass over W (out x in); it saves a pass over the output (n x out). Only in fp32:
    in half precision the small update would be rounded away and the model would be another one.
    """
    return weight.dtype == lora_a.dtype == torch.float32 and tokens.shape[0] >= weight.shape[1]


class PerSampleLinear(torch.autograd.Function):
    """y = W x (+ bias) for lora_A or lora_B alone: per-sample dW (and dbias) go to the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Block,
        bias_block: Block | None,
        sink: GradientSink,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.block, ctx.bias_block, ctx.sink, ctx.rows = block, bias_block, sink, sink.rows
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = grad_outputs[0]
        flat = g.reshape(-1, weight.shape[0])
        ctx.sink.add_outer(ctx.block, ctx.rows, flat, x.reshape(-1, weight.shape[1]))
        if ctx.bias_block is not None:
            ctx.sink.add_sum(ctx.bias_block, ctx.rows, flat)
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, None


def fused_forward(layer: Any, adapter: str, spec: LoraSpec) -> Callable:
    """A forward for a plain PEFT LoRA layer: the fast path."""
    base, lora_a, lora_b = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]
    transposed = isinstance(base, Conv1D)  # GPT-2 stores W as (in, out)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = base.weight.t() if transposed else base.weight
        return FusedLoraLinear.apply(x, lora_a.weight, lora_b.weight, lora_b.bias, weight, base.bias, spec)

    return forward


def linear_forward(linear: Any, block: Block, bias: Block | None, sink: GradientSink) -> Callable:
    """A forward for one of the two linears inside a LoRA layer: the general path."""

    def forward(x: Tensor) -> Tensor:
        return PerSampleLinear.apply(x, linear.weight, linear.bias, block, bias, sink)

    return forward


def one_by_one_forward(module: nn.Module, sink: GradientSink) -> Callable:
    """A forward that passes samples through a (b, T, H) -> (b, T, H) module one at a time.

    Inside a mixture-of-experts block tokens are regrouped by expert, and which sample they came from is lost;
    when only one sample is inside, there is nothing to lose.
    """
    original = module.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = sink.rows
        outputs = []
        try:
            for sample, own in enumerate(hidden.split(1)):
                sink.rows = OneSampleRows(sample)
                outputs.append(original(own, *args, **kwargs))
        finally:
            sink.rows = whole
        if isinstance(outputs[0], tuple):  # (hidden states, router logits)
            return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
        return torch.cat(outputs)

    return forward
