"""Which layers an adapter has, in which order its weights lie, and how each layer is to be handled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradientspace.errors import ModelError
from gradientspace.gradients.layers import Block, GradientSink, LoraSpec, fused_forward, linear_forward


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A LoRA layer of the adapter and how its per-sample gradients are formed."""

    name: str
    module: Any  # a peft LoraLayer, which is also an nn.Module
    spec: LoraSpec
    not_fast: str
    """Why the fast path cannot take this layer; empty when it does."""

    def forwards(self, adapter: str) -> list[tuple[nn.Module, Callable]]:
        """The (module, replacement forward) pairs that make this layer write per-sample gradients."""
        if not self.not_fast:
            return [(self.module, fused_forward(self.module, adapter, self.spec))]
        spec, lora_a, lora_b = self.spec, self.module.lora_A[adapter], self.module.lora_B[adapter]
        return [
            (lora_a, linear_forward(lora_a, spec.a, None, spec.sink)),
            (lora_b, linear_forward(lora_b, spec.b, spec.bias, spec.sink)),
        ]

    def parameters(self, adapter: str) -> list[nn.Parameter]:
        return [*self.module.lora_A[adapter].parameters(), *self.module.lora_B[adapter].parameters()]


def survey(model: nn.Module, adapter: str, sink: GradientSink, path: str) -> tuple[list[AdaptedLayer], list[Block]]:
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

    layout = _layout(model, list(modules.values()), adapter)
    blocks = {block.name: block for block in layout}
    layers = []
    for name, module in modules.items():
        spec = LoraSpec(
            scaling=float(module.scaling[adapter]),
            a=blocks[f"{name}.lora_A.{adapter}.weight"],
            b=blocks[f"{name}.lora_B.{adapter}.weight"],
            bias=blocks.get(f"{name}.lora_B.{adapter}.bias"),
            sink=sink,
        )
        not_fast = "the general path was asked for" if path == "general" else _why_not_fast(module, adapter)
        if not_fast and path == "fast":
            raise ModelError(f"{name}: no fast path, because {not_fast}; use path='auto'")
        layers.append(AdaptedLayer(name, module, spec, not_fast))
    return layers, layout


def _layout(model: nn.Module, modules: list[Any], adapter: str) -> list[Block]:
    own = {
        id(parameter)
        for module in modules
        for factor in (module.lora_A[adapter], module.lora_B[adapter])
        for parameter in factor.parameters()
    }
    layout: list[Block] = []
    offset = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            layout.append(Block(name, tuple(parameter.shape), offset))
            offset += parameter.numel()
    return layout


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


def _why_not_fast(module: Any, adapter: str) -> str:
    """Empty when `FusedLoraLinear` computes just what this layer's own forward would."""
    if type(module) is not LoraLinear:
        return f"{type(module).__name__} has a forward of its own"
    base: Any = module.get_base_layer()
    if base is not module.base_layer or type(base) not in (nn.Linear, Conv1D):
        return f"its base is {type(module.base_layer).__name__}, not a plain linear"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    parts = [module, base, module.lora_A[adapter], module.lora_B[adapter]]
    if any("forward" in part.__dict__ for part in parts):
        return "its forward was replaced by another library"
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "it has forward hooks"
    if any(hasattr(part, "parametrizations") for part in parts):
        return "its weight is parametrised"
    return ""


def regrouping_blocks(model: nn.Module, layers: list[AdaptedLayer], run: Callable[[], Any]) -> dict[str, nn.Module]:
    """Modules inside which tokens lose track of their sample, from one forward pass of (2, 3) tokens.

    A layer that sees (2, 3, features) keeps its samples apart. One that sees anything else, or that was not
    reached (an expert without tokens), may have had its tokens regrouped; the nearest module around it that
    still takes and gives (2, 3, features) is returned, to be run one sample at a time.
    """
    seen: dict[str, tuple[bool, bool]] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            result = output[0] if isinstance(output, tuple) else output
            seen[name] = (_is_whole(first), _is_whole(result))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    modules = dict(model.named_modules())
    for name, module in modules.items():
        watch(name, module)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    blocks = {}
    for layer in layers:
        if seen.get(layer.name, (False, False))[0]:
            continue
        parent = layer.name
        while parent and seen.get(parent, (False, False)) != (True, True):
            parent = parent.rpartition(".")[0]
        if not parent:
            raise ModelError(f"{layer.name}: its tokens cannot be traced to samples; leave it out of the adapter")
        blocks[parent] = modules[parent]
    return blocks


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and tuple(value.shape[:2]) == (2, 3)
