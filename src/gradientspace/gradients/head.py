"""The loss of each sample, with lm_head applied only where a token is supervised.

Sample i's loss is the mean cross-entropy over its supervised tokens, counted in fp32. Most tokens of an
instruction sample are prompt, so their logits are never needed; and the gradient of the summed loss with
respect to the hidden states, `(softmax - onehot) / n_i @ W`, is known as soon as the logits are, so a chunk's
logits are dropped before the next chunk is formed and (tokens x vocabulary) never exists at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradientspace.device import on_device
from gradientspace.errors import ModelError
from gradientspace.gradients.attach import eval_mode, replaced_forwards
from gradientspace.gradients.layers import GradientSink
from gradientspace.gradients.rows import ConsecutiveRows
from gradientspace.memory import repeated_size

# Bytes of fp32 logits that exist at once. Measured on two CPU cores: 4 to 64 MB are equally fast.
CHUNK_BYTES = 32 * 2**20
# A chunk reads all of lm_head twice, so on a GPU it needs hundreds of rows before that is not what it waits for: with
# a vocabulary of 150,000 this is 440 rows. By the ratio of FLOP/s to bytes/s (about 300 on an H100), not measured.
CUDA_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Supervision:
    """The supervised positions of a batch, sample after sample."""

    rows: Tensor  # (n,) int64, the token that predicts each
    targets: Tensor  # (n,) int64
    weights: Tensor  # (n,) float32, 1 / n_i or 1
    samples: Tensor  # (n,) int64, which sample each belongs to
    counts: Tensor  # (b,) int64, n_i

    @classmethod
    def from_labels(cls, labels: Tensor, reduction: str, lengths: list[int] | None = None) -> Supervision:
        """From un-shifted labels (b, T), -100 where not supervised: position t predicts label t + 1.

        With `lengths`, the rows are those of the samples laid end to end without their padding.
        """
        b, length = labels.shape
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        samples = torch.arange(b, device=labels.device)[:, None].expand(b, length)
        if lengths is not None:
            real = torch.arange(length, device=labels.device) < torch.tensor(lengths, device=labels.device)[:, None]
            shifted, samples = shifted[real], samples[real]
        rows = (shifted.flatten() != -100).nonzero().squeeze(1)
        samples = samples.flatten()[rows]
        counts = torch.bincount(samples, minlength=b)
        weights = torch.ones_like(rows, dtype=torch.float32)
        if reduction == "mean":
            weights = weights / counts[samples]
        return cls(rows, shifted.flatten()[rows], weights, samples, counts)

    def to(self, device: torch.device) -> Supervision:
        """The same on `device`."""
        return Supervision(*on_device((self.rows, self.targets, self.weights, self.samples, self.counts), device))

    def per_sample(self, token_losses: Tensor) -> Tensor:
        """Weighted sums of (n,) token losses: (b,) float32."""
        losses = torch.zeros(len(self.counts), dtype=torch.float32, device=token_losses.device)
        return losses.index_add_(0, self.samples, token_losses * self.weights)


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a causal LM does to its head's output, element by element: `cap * tanh(scale * x / cap)`."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> LogitTransform:
        text = config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere
        scale /= float(getattr(text, "logits_scaling", None) or 1.0)  # Granite
        cap = getattr(text, "final_logit_softcapping", None)  # Gemma
        return cls(scale, None if cap is None else float(cap))

    def apply(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def apply_(self, logits: Tensor) -> Tensor:
        """The same in place, outside autograd."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient before the transform from the gradient after it; `logits` are after it."""
        if self.cap is not None:
            grad.mul_(1 - (logits / self.cap).square_())
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


class SupervisedCrossEntropy(torch.autograd.Function):
    """(b, T, H) hidden states -> (n,) token losses; backward gives the gradient of their weighted sum.

    The upstream gradient is not looked at: the sum over samples is what is always differentiated here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        where: Supervision,
        transform: LogitTransform,
    ) -> Tensor:
        selected = hidden.reshape(-1, hidden.shape[-1])[where.rows]
        grad = torch.empty_like(selected)
        losses = torch.empty(len(selected), dtype=torch.float32, device=hidden.device)
        chunk = CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
        step = max(1, chunk // (4 * weight.shape[0]))
        for start in range(0, len(selected), step):
            part = slice(start, start + step)
            target = where.targets[part, None]
            logits = transform.apply_(F.linear(selected[part], weight, bias).float())
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            losses[part] = (normaliser - logits.gather(1, target)).squeeze(1)
            softcapped = logits.clone() if transform.cap is not None else logits
            dlogits = logits.sub_(normaliser).exp_()
            dlogits.scatter_add_(1, target, torch.full_like(normaliser, -1.0))
            dlogits = transform.backward_(dlogits.mul_(where.weights[part, None]), softcapped)
            grad[part] = dlogits.to(weight.dtype) @ weight
        ctx.save_for_backward(grad, where.rows)
        ctx.shape = hidden.shape
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, rows = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape)
        full.view(-1, grad.shape[-1])[rows] = grad
        return full, None, None, None, None


class Head:
    """Runs a causal LM and returns its supervised token losses.

    `mode` says how, best first, and `why` what stands in the way of the one before:
    "chunked"    only supervised positions pass lm_head, in chunks whose logits are dropped at once
    "supervised" only supervised positions pass lm_head, whatever module it is (it may be adapted itself)
    "model"      the model's own logits at every position
    """

    def __init__(self, causal_lm: Any, sink: GradientSink) -> None:
        find_head = getattr(causal_lm, "get_output_embeddings", None)
        if find_head is None or find_head() is None:
            raise ModelError(f"{type(causal_lm).__name__} has no lm_head; give a causal language model")
        self.causal_lm = causal_lm
        self.sink = sink
        self.lm_head: Any = find_head()
        self.transform = LogitTransform.from_config(causal_lm.config)
        self.mode, self.why = self._probe()

    def token_losses(self, inputs: dict[str, Any], where: Supervision) -> Tensor:
        """(n,) float32 cross-entropies at the supervised positions, attached to the graph."""
        if self.mode == "model":
            logits = self.causal_lm(**inputs, use_cache=False).logits
            selected = logits.reshape(-1, logits.shape[-1])[where.rows].float()
            return F.cross_entropy(selected, where.targets, reduction="none")
        hidden, _ = self._catch_hidden(inputs)
        if self.mode == "chunked":
            bias = getattr(self.lm_head, "bias", None)
            return SupervisedCrossEntropy.apply(hidden, self.lm_head.weight, bias, where, self.transform)
        whole = self.sink.rows
        self.sink.rows = ConsecutiveRows(tuple(where.counts.tolist()))  # an adapted lm_head reads it
        selected = hidden.reshape(-1, hidden.shape[-1])[where.rows]
        logits = self.transform.apply(self.lm_head(selected).float())
        self.sink.rows = whole
        return F.cross_entropy(logits, where.targets, reduction="none")

    def _catch_hidden(self, inputs: dict[str, Any], keep_logits: bool = False) -> tuple[Tensor, Any]:
        """The hidden states that reach lm_head, (b, T, H), and the model's output."""
        caught: list[Tensor] = []
        original = self.lm_head.forward

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return original(hidden) if keep_logits else hidden.new_zeros(hidden.shape[0], 1, 1)

        with replaced_forwards([(self.lm_head, catch)]):
            output = self.causal_lm(**inputs, use_cache=False)
        return caught[0], output

    def _probe(self) -> tuple[str, str]:
        """Three tokens decide: are the model's logits those of lm_head and the transform we know?"""
        with torch.no_grad():
            hidden, output = self._catch_hidden({"input_ids": probe_tokens(self.causal_lm)}, keep_logits=True)
            expected = self.transform.apply(self.lm_head(hidden).float())
        logits = output.logits.float()
        if logits.shape != expected.shape:
            return "model", "the model reshapes its logits"
        if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-3, equal_nan=True):
            return "model", "the model changes its logits in a way that is not known here"
        if type(self.lm_head) is not nn.Linear:
            return "supervised", f"lm_head is {type(self.lm_head).__name__}, not a plain linear"
        return "chunked", ""


@contextmanager
def of_rows(lm_head: Any, rows: Tensor) -> Iterator[None]:
    """Inside, lm_head makes logits of these rows (n,) of the flattened (b T, H) hidden states only: (1, n, V)."""
    whole, n = lm_head.forward, len(rows)
    repeated = torch.cat([rows, rows[:1].expand(repeated_size(n) - n)])  # what is too much is cut off again

    def selecting(hidden: Tensor) -> Tensor:
        return whole(hidden.flatten(0, 1)[repeated][None])[:, :n]

    with replaced_forwards([(lm_head, selecting)]):
        yield


def head_selects_rows(causal_lm: Any) -> bool:
    """Whether lm_head may be given some positions only: is nothing but element-wise work done to its logits?"""
    find_head = getattr(causal_lm, "get_output_embeddings", None)
    if find_head is None or find_head() is None:
        return False
    with eval_mode(causal_lm):
        return Head(causal_lm, GradientSink()).mode != "model"


def probe_tokens(causal_lm: Any) -> Tensor:
    """(2, 3) int64 token ids that any vocabulary has."""
    embedding = causal_lm.get_input_embeddings().weight
    return torch.arange(6, device=embedding.device).view(2, 3) % embedding.shape[0]
