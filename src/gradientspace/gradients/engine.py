"""PerSampleGradients: exact per-sample gradients of a LoRA adapter from one batched backward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gradientspace.errors import ModelError
from gradientspace.gradients.batching import (
    GradientBatch,
    TokenisedSample,
    check_samples,
    collate,
    plan_batches,
    right_padded,
)
from gradientspace.gradients.head import Head, Supervision, replaced_forwards
from gradientspace.gradients.layers import AdaptedLayer, Block, GradientSink, survey

logger = logging.getLogger(__name__)

# A batch's gradient matrix may take this much memory; it bounds the rows of a streamed batch.
GRADIENT_BYTES = 2**30


class PerSampleGradients:
    """Gradients, sample by sample, of the LoRA weights of `adapter_name` in `model`.

    Row i is the gradient, at the adapter's present weights, of sample i's mean completion-token
    cross-entropy: prompt tokens masked, each sample alone, no averaging over the batch, dropout off. It has
    the full LoRA dimension D; nothing is projected.

        with PerSampleGradients(model) as engine:
            gradients = engine.compute({"input_ids": ids, "attention_mask": mask, "labels": labels})  # (b, D)

    Parameters
    ----------
    model : a `peft.PeftModel` (or a transformers model with a LoRA adapter added) that is a causal LM.
    adapter_name : the adapter to differentiate. It alone is active while gradients are computed.
    path : "auto" takes the fast path in every layer that it knows and the general path in the others; "fast"
        raises ModelError where a layer needs the general one; "general" uses it everywhere.
    loss : "mean" over a sample's supervised tokens, or their "sum".

    The model is changed only while a gradient is computed: its forward methods, training mode, requires_grad
    flags and active adapter are as before after every call, and nothing is left behind in `.grad`.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str = "default",
        *,
        path: Literal["auto", "fast", "general"] = "auto",
        loss: Literal["mean", "sum"] = "mean",
    ) -> None:
        if path not in ("auto", "fast", "general"):
            raise ModelError(f"path is '{path}'; it must be auto, fast or general")
        if loss not in ("mean", "sum"):
            raise ModelError(f"loss is '{loss}'; it must be mean or sum")
        self.model = model
        self.adapter_name = adapter_name
        self.loss = loss
        self.layout: list[Block]
        self._sink = GradientSink()
        self._layers, self.layout = survey(model, adapter_name, self._sink)
        self._fast = [path != "general" and not layer.not_fast for layer in self._layers]
        if path == "fast" and not all(self._fast):
            layer = next(layer for layer in self._layers if layer.not_fast)
            raise ModelError(f"{layer.name}: no fast path, because {layer.not_fast}; use path='auto'")
        self._causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        with self._attached():
            self._head = Head(self._causal_lm)
        self._losses: Tensor | None = None
        self._closed = False

    @property
    def dim(self) -> int:
        """D, the number of LoRA parameters."""
        return self.layout[-1].offset + self.layout[-1].size

    @property
    def device(self) -> torch.device:
        """Where gradients are returned: the device of the first adapted layer."""
        return self._layers[0].module.lora_A[self.adapter_name].weight.device

    @property
    def path(self) -> str:
        """fast, general, or mixed (the layers differ)."""
        return "fast" if all(self._fast) else "mixed" if any(self._fast) else "general"

    @property
    def losses(self) -> Tensor:
        """(b,) float32 losses of the last `compute`, in nats."""
        if self._losses is None:
            raise ValueError("no losses yet: call compute first")
        return self._losses

    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """Raw per-sample gradients, (b, D) float32, on `device`.

        `batch` has input_ids, attention_mask and labels, each (b, T), padded on either side; labels are as in
        transformers: not shifted, -100 where not supervised. Raises DataError for a row without a
        supervised token. A row whose loss is not finite comes back non-finite; the others are unaffected.
        """
        if self._closed:
            raise ValueError("this engine is closed")
        device = self._causal_lm.get_input_embeddings().weight.device
        input_ids, labels = right_padded({key: value.to(device) for key, value in batch.items()})
        where = Supervision.from_labels(labels, self.loss)
        out = torch.empty(len(labels), self.dim, dtype=torch.float32, device=self.device)
        with self._attached():
            self._sink.open(out, (labels.shape[0], labels.shape[1]))
            token_losses = self._head.token_losses({"input_ids": input_ids}, where)
            (token_losses * where.weights).sum().backward()
            self._sink.close(self.layout)
        self._losses = where.per_sample(token_losses.detach())
        return out

    def stream(
        self,
        samples: Sequence[TokenisedSample],
        *,
        max_tokens: int = 4096,
        seed: int = 0,
        pad_token_id: int = 0,
        shuffle: bool = True,
    ) -> Iterator[GradientBatch]:
        """Yield the gradients of all samples, batch by batch; memory does not grow with their number.

        Batches hold samples of similar length, at most `max_tokens` tokens with padding; their order is
        shuffled by `seed` (see `plan_batches`) and repeats exactly for equal arguments.
        """
        check_samples(samples)
        lengths = [len(sample.input_ids) for sample in samples]
        max_samples = max(1, GRADIENT_BYTES // (4 * self.dim))
        plan = plan_batches(
            lengths, max_tokens=max_tokens, max_samples=max_samples, seed=seed, shuffle=shuffle
        )
        for indices in plan:
            gradients = self.compute(collate([samples[i] for i in indices], pad_token_id))
            norms = torch.linalg.vector_norm(gradients, dim=1)
            yield GradientBatch(torch.tensor(indices), gradients, self.losses, norms)

    def close(self) -> None:
        """End the use of this engine. The model needs no clean-up: every call leaves it as it was."""
        self._closed = True
        self._losses = None

    def __enter__(self) -> PerSampleGradients:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The model in eval mode, this adapter alone active and differentiable, its forwards replaced."""
        with ExitStack() as stack:
            stack.enter_context(_eval_mode(self.model))
            stack.enter_context(_only_active(self.model, self.adapter_name))
            stack.enter_context(_only_differentiable(self.model, self._layers, self.adapter_name))
            pairs = [
                pair
                for layer, fast in zip(self._layers, self._fast, strict=True)
                for pair in layer.forwards(self.adapter_name, fast)
            ]
            stack.enter_context(replaced_forwards(pairs))
            stack.enter_context(torch.enable_grad())
            yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
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
def _only_active(model: nn.Module, adapter: str) -> Iterator[None]:
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
def _only_differentiable(model: nn.Module, layers: list[AdaptedLayer], adapter: str) -> Iterator[None]:
    """Only the adapter's own weights require a gradient."""
    own = {
        id(parameter)
        for layer in layers
        for factor in (layer.module.lora_A[adapter], layer.module.lora_B[adapter])
        for parameter in factor.parameters()
    }
    changed = [p for p in model.parameters() if p.requires_grad != (id(p) in own)]
    try:
        for parameter in changed:
            parameter.requires_grad_(id(parameter) in own)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(id(parameter) not in own)
