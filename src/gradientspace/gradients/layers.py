"""How one LoRA layer forms the gradients of its A and B for each sample, and which layers can.

For y = W x + s B A x and an upstream gradient g, sample i owns the rows (tokens) R_i and

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
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradientspace.errors import ModelError


@dataclass(frozen=True, slots=True)
class Block:
    """Where one LoRA parameter lies in a gradient row: `row[offset : offset + prod(shape)].view(shape)`."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class GradientSink:
    """Where layers write during a backward pass: a (b, D) matrix and the map from tokens to samples.

    `rows` is (b, T): every layer sees b * T token rows in that order.
    """

    def __init__(self) -> None:
        self.out: Tensor = torch.empty(0)
        self.rows: tuple[int, int] = (0, 0)
        self._written: set[int] = set()

    def open(self, out: Tensor, rows: tuple[int, int]) -> None:
        self.out, self.rows = out, rows
        self._written = set()

    def add_outer(self, block: Block, left: Tensor, right: Tensor) -> None:
        """Add `left_i^T right_i` to sample i's block; left (n, p), right (n, q), block shape (p, q)."""
        b, length = self.rows
        if left.shape[0] != b * length:
            raise ModelError(
                f"{block.name}: the layer saw {left.shape[0]} token rows where the batch has {b} x {length}; "
                "its tokens cannot be traced to samples"
            )
        product = torch.bmm(left.view(b, length, -1).transpose(1, 2), right.view(b, length, -1))
        self._add(block, product)

    def add_sum(self, block: Block, values: Tensor) -> None:
        """Add the sum of sample i's rows of `values` (n, p) to its block of shape (p,)."""
        b, length = self.rows
        self._add(block, values.view(b, length, -1).sum(dim=1))

    def _add(self, block: Block, values: Tensor) -> None:
        target = self.out[:, block.offset : block.offset + block.size].view(values.shape)
        if block.offset in self._written:  # a layer that runs more than once in a forward pass
            target.add_(values)
        else:
            target.copy_(values)
            self._written.add(block.offset)

    def close(self, layout: list[Block]) -> None:
        """Zero the blocks whose layer took no part in this pass."""
        for block in layout:
            if block.offset not in self._written:
                self.out[:, block.offset : block.offset + block.size] = 0
        self.out = torch.empty(0)


@dataclass(slots=True)
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
        merge = _merging_pays(tokens, weight, lora_a)
        h = tokens.to(lora_a.dtype) @ lora_a.t()
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
        ctx.spec, ctx.merge, ctx.x_shape = spec, merge, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, h, lora_a, lora_b, weight = ctx.saved_tensors
        spec: LoraSpec = ctx.spec
        g = grad_outputs[0].reshape(-1, weight.shape[0])
        g_adapter = g.to(lora_a.dtype)
        dh = (g_adapter @ lora_b).mul_(spec.scaling)  # (n, r)
        spec.sink.add_outer(spec.a, dh, tokens.to(lora_a.dtype))
        spec.sink.add_outer(spec.b, g_adapter, h * spec.scaling)
        if spec.bias is not None:
            spec.sink.add_sum(spec.bias, g_adapter * spec.scaling)
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
        ctx.block, ctx.bias_block, ctx.sink = block, bias_block, sink
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = grad_outputs[0]
        flat = g.reshape(-1, weight.shape[0])
        ctx.sink.add_outer(ctx.block, flat, x.reshape(-1, weight.shape[1]))
        if ctx.bias_block is not None:
            ctx.sink.add_sum(ctx.bias_block, flat)
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, None


@dataclass(slots=True)
class AdaptedLayer:
    """A LoRA layer of the adapter and the reason why the fast path cannot take it (empty when it can)."""

    name: str
    module: Any  # a peft LoraLayer, which is also an nn.Module
    spec: LoraSpec
    not_fast: str

    def forwards(self, adapter: str, fast: bool) -> list[tuple[nn.Module, Callable]]:
        """The (module, replacement forward) pairs that make this layer write per-sample gradients."""
        lora_a, lora_b = self.module.lora_A[adapter], self.module.lora_B[adapter]
        if fast:
            return [(self.module, _fused_forward(self.module, lora_a, lora_b, self.spec))]
        spec = self.spec
        return [
            (lora_a, _linear_forward(lora_a, spec.a, None, spec.sink)),
            (lora_b, _linear_forward(lora_b, spec.b, spec.bias, spec.sink)),
        ]


def _fused_forward(layer: Any, lora_a: Any, lora_b: Any, spec: LoraSpec) -> Callable:
    base = layer.get_base_layer()
    transposed = isinstance(base, Conv1D)  # GPT-2 stores W as (in, out)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = base.weight.t() if transposed else base.weight
        return FusedLoraLinear.apply(x, lora_a.weight, lora_b.weight, lora_b.bias, weight, base.bias, spec)

    return forward


def _linear_forward(linear: Any, block: Block, bias: Block | None, sink: GradientSink) -> Callable:
    def forward(x: Tensor) -> Tensor:
        return PerSampleLinear.apply(x, linear.weight, linear.bias, block, bias, sink)

    return forward


def survey(model: nn.Module, adapter: str, sink: GradientSink) -> tuple[list[AdaptedLayer], list[Block]]:
    """Find every LoRA layer of `adapter` and fix the order of its parameters.

    The order is that of `model.named_parameters()`. Raises ModelError, naming the layer, for anything whose
    per-sample gradient we cannot form exactly; no layer is ever skipped silently.
    """
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            raise ModelError(
                f"{name}: adapter '{adapter}' also trains whole modules or tokens ({type(module).__name__}), "
                "which per-sample LoRA gradients do not cover; drop modules_to_save / trainable_token_indices"
            )
        if isinstance(module, BaseTunerLayer) and adapter in _adapters_of(module):
            _refuse_unknown(name, module, adapter)
            modules[name] = module
    if not modules:
        known = sorted({a for m in model.modules() if isinstance(m, BaseTunerLayer) for a in _adapters_of(m)})
        raise ModelError(f"no LoRA layers for adapter '{adapter}'; there are {known or 'none'}")

    wanted = {}
    for module in modules.values():
        for linear in (module.lora_A[adapter], module.lora_B[adapter]):
            wanted.update({id(p): p for p in linear.parameters()})
    layout, by_id, offset = [], {}, 0
    for name, parameter in model.named_parameters():
        if id(parameter) in wanted:
            block = Block(name, tuple(parameter.shape), offset)
            layout.append(block)
            by_id[id(parameter)] = block
            offset += block.size

    layers = []
    for name, module in modules.items():
        lora_a, lora_b = module.lora_A[adapter], module.lora_B[adapter]
        spec = LoraSpec(
            scaling=float(module.scaling[adapter]),
            a=by_id[id(lora_a.weight)],
            b=by_id[id(lora_b.weight)],
            bias=None if lora_b.bias is None else by_id[id(lora_b.bias)],
            sink=sink,
        )
        layers.append(AdaptedLayer(name, module, spec, _why_not_fast(module, adapter)))
    return layers, layout


def _adapters_of(module: BaseTunerLayer) -> set[str]:
    """Names of the adapters that hold parameters in this layer."""
    containers = (getattr(module, attribute, None) for attribute in module.adapter_layer_names)
    return {key for container in containers if container is not None for key in container}


def _refuse_unknown(name: str, module: BaseTunerLayer, adapter: str) -> None:
    kind = type(module).__name__
    if not isinstance(module, LoraLayer):
        raise ModelError(f"{name}: {kind} is not a LoRA layer; give a LoRA adapter")
    if isinstance(module, (ParamWrapper, MultiheadAttention)):
        raise ModelError(
            f"{name}: {kind} adapts a bare parameter, so tokens cannot be traced to samples; "
            "leave it out of target_parameters / target_modules"
        )
    if adapter in module.lora_variant:
        variant = module.lora_variant[adapter]
        variant_name = (variant if isinstance(variant, type) else type(variant)).__name__
        raise ModelError(f"{name}: {variant_name} is not plain LoRA; train the adapter without it")
    if module.merged:
        raise ModelError(f"{name}: {module.merged_adapters} merged into the base; call unmerge_adapter()")
    for factors in (module.lora_A, module.lora_B):
        if adapter not in factors or type(factors[adapter]) is not nn.Linear:
            found = type(factors[adapter]).__name__ if adapter in factors else "no linear factor"
            raise ModelError(f"{name}: {kind} has {found} for A or B; adapt linear layers only")


def _why_not_fast(module: LoraLayer, adapter: str) -> str:
    """Empty when `FusedLoraLinear` computes just what this layer's own forward would."""
    if type(module) is not LoraLinear:
        return f"{type(module).__name__} has a forward of its own"
    base = module.get_base_layer()
    if base is not module.base_layer or type(base) not in (nn.Linear, Conv1D):
        return f"its base is {type(module.base_layer).__name__}, not a plain linear"
    parts = [module, base, module.lora_A[adapter], module.lora_B[adapter]]
    if any("forward" in part.__dict__ for part in parts):
        return "its forward was replaced by another library"
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "it has forward hooks"
    if any(hasattr(part, "parametrizations") for part in parts):
        return "its weight is parametrised"
    return ""
