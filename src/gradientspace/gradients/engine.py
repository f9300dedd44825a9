"""PerSampleGradients: exact per-sample gradients of a LoRA adapter from one batched backward pass."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from gradientspace.data import TokenisedSample, pad_batch
from gradientspace.device import on_device
from gradientspace.errors import GradientSpaceError, ModelError
from gradientspace.gradients.attach import (
    checkpointed_forward,
    checkpointed_layers,
    eval_mode,
    only_active,
    only_differentiable,
    replaced_forwards,
)
from gradientspace.gradients.batching import (
    ExcludedSample,
    GradientBatch,
    check_samples,
    plan_batches,
    right_padded,
)
from gradientspace.gradients.check import largest_relative_error, plain_gradient, random_batch
from gradientspace.gradients.head import Head, Supervision, probe_tokens
from gradientspace.gradients.layers import Block, GradientSink, one_by_one_forward
from gradientspace.gradients.packing import packed_inputs, segment_attention_in, why_not_packable
from gradientspace.gradients.rows import ConsecutiveRows
from gradientspace.gradients.store import GradientStore
from gradientspace.gradients.survey import regrouping_blocks, survey

logger = logging.getLogger(__name__)

# A batch's gradient matrix may take this much memory; it bounds the rows of a streamed batch.
GRADIENT_BYTES = 2**30
# The self-check catches wrong formulas, not rounding: rounding in fp32 is 1e-6 to 1e-5.
CHECK_LIMIT = {torch.float32: 1e-3, torch.float64: 1e-3}
CHECK_LIMIT_HALF = 0.2
# Padding above which a packed batch is faster; its attention goes sample by sample. Measured on two cores.
PACKING_PAYS = 0.1


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
    unit_norm : scale every row to length 1 (a zero row stays zero); norms are reported before scaling.
    packing : lay the samples of a batch end to end in one row without padding, with attention inside each
        sample only. True: always, ModelError where that is not exact. None: where it is exact, on a CPU, for
        a batch that would be more than a tenth padding.
    self_check : compare a batch of two random samples with plain autograd on each before any use.

    Raises ModelError, naming the layer, for an adapter whose gradients cannot be formed exactly (DoRA and
    other variants, adapted embeddings or bare parameters, modules_to_save, merged adapters).

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
        unit_norm: bool = False,
        packing: bool | None = None,
        self_check: bool = True,
    ) -> None:
        _check_choice("path", path, ("auto", "fast", "general"))
        _check_choice("loss", loss, ("mean", "sum"))
        self.model = model
        self.adapter_name = adapter_name
        self.loss = loss
        self.unit_norm = unit_norm
        self.packing = packing
        self.layout: list[Block]
        self.excluded: list[ExcludedSample] = []
        self._longest = 0  # of the samples that were planned last
        self._closed = False
        self._losses: Tensor | None = None
        self._norms: Tensor | None = None
        self._sink = GradientSink()
        self._causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._layers, self.layout = survey(model, adapter_name, self._sink, path)
        if not getattr(self._causal_lm.config, "is_causal", True):
            raise ModelError(f"{type(self._causal_lm).__name__} attends both ways; give a causal language model")
        self._one_by_one = self._find_regrouping_blocks()
        self._why_not_packed = why_not_packable(self._causal_lm, self._one_by_one)
        if packing and self._why_not_packed:
            raise ModelError(f"packing: {self._why_not_packed}; use packing=None")
        if packing is None and not self._why_not_packed:
            self._why_not_packed = self._why_not_worth_packing()
        self._dropout = self._dropout_rates()
        with self._attached():
            self._head = Head(self._causal_lm, self._sink)
        self._error = self._self_check() if self_check else None

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
        fast = [not layer.not_fast for layer in self._layers]
        return "fast" if all(fast) else "mixed" if any(fast) else "general"

    @property
    def losses(self) -> Tensor:
        """(b,) float32 losses of the last `compute`, in nats."""
        if self._losses is None:
            raise ValueError("no losses yet: call compute first")
        return self._losses

    @property
    def norms(self) -> Tensor:
        """(b,) float32 Euclidean norms of the gradients of the last `compute`, before any scaling."""
        if self._norms is None:
            raise ValueError("no norms yet: call compute first")
        return self._norms

    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """Per-sample gradients, (b, D) float32, on `device`.

        `batch` has input_ids, attention_mask and labels, each (b, T), padded on either side; labels are as in
        transformers: not shifted, -100 where not supervised. Raises DataError for a row without a
        supervised token. A row whose loss is not finite comes back non-finite; the others are unaffected.
        """
        if self._closed:
            raise ValueError("this engine is closed")
        # Looked at on the CPU, where it usually is: every look at a GPU's numbers would wait for all its work.
        input_ids, labels, lengths = right_padded({key: value.cpu() for key, value in batch.items()})
        return self._run(input_ids, labels, lengths, self._packs(lengths))

    def _run(self, input_ids: Tensor, labels: Tensor, lengths: list[int], packed: bool) -> Tensor:
        """`input_ids` and `labels` (b, T) on the CPU."""
        device = self._causal_lm.get_input_embeddings().weight.device
        where = Supervision.from_labels(labels, self.loss, lengths if packed else None).to(device)
        out = torch.empty(len(labels), self.dim, dtype=torch.float32, device=self.device)
        with self._attached(), ExitStack() as stack:
            if packed:
                stack.enter_context(segment_attention_in(self._causal_lm))
                self._sink.open(out, ConsecutiveRows(tuple(lengths)))
                inputs = packed_inputs(input_ids, lengths, device)
            else:
                self._sink.open(out, ConsecutiveRows((labels.shape[1],) * len(labels)))
                inputs = {"input_ids": on_device([input_ids], device)[0]}
            token_losses = self._head.token_losses(inputs, where)
            (token_losses * where.weights).sum().backward()
            self._sink.close(self.layout)
        self._losses = where.per_sample(token_losses.detach())
        self._norms = norms = torch.linalg.vector_norm(out, dim=1)
        if self.unit_norm:
            out /= norms.masked_fill(norms == 0, 1.0)[:, None]
        return out

    def stream(
        self,
        samples: Sequence[TokenisedSample],
        *,
        max_tokens: int = 4096,
        seed: int = 0,
        pad_token_id: int = 0,
        shuffle: bool = True,
        store: str | Path | None = None,
    ) -> Iterator[GradientBatch]:
        """Yield the gradients of all samples, batch by batch; memory does not grow with their number.

        The batches are those of `plan`, in its order. A sample whose loss or gradient is not finite is left out
        of its batch, logged by row and listed in `excluded`.

        With `store`, a file of N x D float32 numbers, every row is also kept there; a later call with the
        same samples and weights yields the same batches and computes only what is missing.
        """
        kept = None if store is None else GradientStore.open(store, self, samples)
        for indices in self.plan(samples, max_tokens=max_tokens, seed=seed, shuffle=shuffle):
            batch = self.batch(samples, indices, pad_token_id=pad_token_id, store=kept)
            if len(batch.indices):
                yield batch

    def plan(
        self, samples: Sequence[TokenisedSample], *, max_tokens: int = 4096, seed: int = 0, shuffle: bool = True
    ) -> list[list[int]]:
        """The batches of a stream, as positions in `samples`; a new stream, so `excluded` is empty again.

        Batches hold samples of similar length, at most `max_tokens` tokens with padding; their order is
        shuffled by `seed` (see `plan_batches`) and repeats exactly for equal arguments.
        """
        check_samples(samples)
        self.excluded = []
        lengths = [len(sample.input_ids) for sample in samples]
        self._longest = max(lengths, default=0)
        limit = max(1, GRADIENT_BYTES // (4 * self.dim))
        return plan_batches(lengths, max_tokens=max_tokens, max_samples=limit, seed=seed, shuffle=shuffle)

    def batch(
        self,
        samples: Sequence[TokenisedSample],
        indices: list[int],
        *,
        pad_token_id: int = 0,
        store: GradientStore | None = None,
    ) -> GradientBatch:
        """One batch of the plan: gradients of the samples at `indices`, of those that have finite ones."""
        batch = store.read(indices) if store is not None else None
        if batch is None:
            gradients = self.compute(pad_batch([samples[i] for i in indices], pad_token_id, longest=self._longest))
            batch = GradientBatch(torch.tensor(indices), gradients, self.losses, self.norms)
            if store is not None:
                store.write(batch)
        return self._only_finite(batch, samples)

    def explain(self) -> str:
        """What the engine does with this model, and why, in a few lines."""
        lines = [f"adapter '{self.adapter_name}': {len(self._layers)} layers, D = {self.dim:,}"]
        fast = sum(not layer.not_fast for layer in self._layers)
        lines.append(f"path: {self.path} ({fast} layers fast, {len(self._layers) - fast} general)")
        for reason, count in Counter(layer.not_fast for layer in self._layers if layer.not_fast).items():
            first = next(layer.name for layer in self._layers if layer.not_fast == reason)
            lines.append(f"  general in {count} layers, such as {first}: {reason}")
        for name in self._one_by_one:
            lines.append(f"  one sample at a time inside {name}: tokens are regrouped there")
        lines.append(f"lm_head: {self._head.mode}" + (f", because {self._head.why}" if self._head.why else ""))
        attention = getattr(self._causal_lm.config, "_attn_implementation", None)
        lines.append(f"attention: {attention}; inside each sample (sdpa) when packed")
        lines.append(f"packing: {self._describe_packing()}")
        lines.append(f"checkpointed layers: {len(checkpointed_layers(self.model))}")
        if self._dropout:
            lines.append(f"dropout off while gradients are computed; training uses {self._dropout}")
        lines.append(f"loss: {self.loss} over a sample's supervised tokens; unit norm: {self.unit_norm}")
        if self._error is not None:
            found = f"largest relative error {self._error:.1e}"
            if not math.isfinite(self._error):
                found = "not possible, its random samples have no finite gradient"
            lines.append(f"self-check against plain autograd: {found}")
        return "\n".join(lines)

    @property
    def settings(self) -> dict[str, Any]:
        """What a gradient from this engine depends on beside weights and samples; JSON-able."""
        return {
            "adapter_name": self.adapter_name,
            "dim": self.dim,
            "path": self.path,
            "loss": self.loss,
            "unit_norm": self.unit_norm,
            "packing": self.packing,
            "lm_head": self._head.mode,
            "attention": getattr(self._causal_lm.config, "_attn_implementation", None),
            "model_dtype": str(self._causal_lm.get_input_embeddings().weight.dtype),
            "adapter_dtype": str(self._layers[0].module.lora_A[self.adapter_name].weight.dtype),
        }

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, in the order of `layout`."""
        parameters = dict(self.model.named_parameters())
        return [parameters[block.name] for block in self.layout]

    def close(self) -> None:
        """End the use of this engine. The model needs no clean-up: every call leaves it as it was."""
        self._closed = True
        self._losses = self._norms = None

    def __enter__(self) -> PerSampleGradients:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The model in eval mode, this adapter alone active and differentiable, its forwards replaced."""
        pairs = [pair for layer in self._layers for pair in layer.forwards(self.adapter_name)]
        pairs += [(block, one_by_one_forward(block, self._sink)) for block in self._one_by_one.values()]
        pairs += [(layer, checkpointed_forward(layer)) for layer in checkpointed_layers(self.model)]
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(only_active(self.model, self.adapter_name))
            stack.enter_context(only_differentiable(self.model, self.parameters()))
            stack.enter_context(replaced_forwards(pairs))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(torch.enable_grad())
            yield

    def _find_regrouping_blocks(self) -> dict[str, nn.Module]:
        def run() -> None:
            with eval_mode(self.model), only_active(self.model, self.adapter_name), torch.no_grad():
                self._causal_lm(input_ids=probe_tokens(self._causal_lm), use_cache=False)

        return regrouping_blocks(self.model, self._layers, run)

    def _why_not_worth_packing(self) -> str:
        attention = getattr(self._causal_lm.config, "_attn_implementation", None)
        if attention != "sdpa":
            return f"it would replace the attention that was chosen, {attention}"
        return "" if self.device.type == "cpu" else f"not measured on {self.device.type}"

    def _packs(self, lengths: list[int]) -> bool:
        """Whether a batch of samples of these lengths is packed."""
        if self.packing is not None:
            return self.packing
        return not self._why_not_packed and sum(lengths) < (1 - PACKING_PAYS) * len(lengths) * max(lengths)

    def _describe_packing(self) -> str:
        if self.packing is not None:
            return "always" if self.packing else "never"
        return f"never; {self._why_not_packed}" if self._why_not_packed else f"above {PACKING_PAYS:.0%} padding"

    def _dropout_rates(self) -> list[float]:
        """The adapter's non-zero dropout rates, announced once."""
        modules = [layer.module.lora_dropout[self.adapter_name] for layer in self._layers]
        rates = sorted({float(module.p) for module in modules if isinstance(module, nn.Dropout) and module.p})
        if rates:
            logger.warning("lora_dropout %s is off while per-sample gradients are computed", rates)
        return rates

    def _self_check(self) -> float:
        """Largest relative error on two random samples; raises where it is more than rounding."""
        batch = random_batch(self._causal_lm)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        ids, labels, own = batch["input_ids"].cpu(), batch["labels"].cpu(), self.parameters()
        references = torch.stack(
            [
                plain_gradient(
                    self.model, self._causal_lm, self.adapter_name, own, ids[i, :n], labels[i, :n], self.loss
                )
                for i, n in enumerate(lengths)
            ]
        ).to(self.device)
        errors = []
        for packed in {False, self._packs(lengths)}:
            gradients = self._run(ids, labels, lengths, packed)
            if self.unit_norm:
                gradients = gradients * self.norms[:, None]
            errors.append(largest_relative_error(gradients, references))
        self._losses = self._norms = None
        error = torch.tensor(errors).max().item()  # unlike max(), passes NaN on
        limit = CHECK_LIMIT.get(self._causal_lm.get_input_embeddings().weight.dtype, CHECK_LIMIT_HALF)
        if math.isfinite(error) and error > limit:
            raise GradientSpaceError(
                f"self-check: gradients differ from plain autograd by {error:.1e}, limit {limit:.0e}; "
                f"please report this with the model's class, {type(self._causal_lm).__name__}"
            )
        return error

    def _only_finite(self, batch: GradientBatch, samples: Sequence[TokenisedSample]) -> GradientBatch:
        finite = torch.isfinite(batch.norms) & torch.isfinite(batch.losses)
        if bool(finite.all()):
            return batch
        for position in (~finite).nonzero().flatten().tolist():
            index = int(batch.indices[position])
            row = getattr(samples[index], "row", index + 1)
            loss = float(batch.losses[position])
            self.excluded.append(ExcludedSample(index, row, loss))
            logger.warning("row %d: loss %s, gradient not finite; excluded", row, loss)
        return GradientBatch(
            batch.indices[finite.cpu()], batch.gradients[finite], batch.losses[finite], batch.norms[finite]
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelError(f"{name} is '{value}'; it must be one of {', '.join(allowed)}")
