"""What is changed on a model while gradients are computed, each change undone on the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def replaced_forwards(pairs: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Give each module another `forward`."""
    before = [(module, module.__dict__.get("forward")) for module, _ in pairs]
    try:
        for module, forward in pairs:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off in every module, whatever mode each was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def only_active(model: nn.Module, adapter: str) -> Iterator[None]:
    """Only `adapter` takes part in the forward pass. PEFT's set_adapter would also touch requires_grad."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [adapter], False
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def only_differentiable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Only `parameters` require a gradient."""
    own = {id(parameter) for parameter in parameters}
    changed = [p for p in model.parameters() if p.requires_grad != (id(p) in own)]
    try:
        for parameter in changed:
            parameter.requires_grad_(id(parameter) in own)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(id(parameter) not in own)


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers on which `gradient_checkpointing_enable` was called."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]


def checkpointed_forward(layer: Any) -> Callable:
    """The layer's forward under its own checkpoint function.

    transformers checkpoints only in training mode, which would switch dropout on; so we do it here.
    """
    original = layer.forward
    run = layer._gradient_checkpointing_func
    reentrant = getattr(run, "keywords", {}).get("use_reentrant", True)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if reentrant and not hidden.requires_grad:
            # a reentrant checkpoint without a differentiable input has no backward pass at all
            hidden = hidden.detach().requires_grad_(True)
        return run(partial(original, **kwargs), hidden, *args)

    return forward
