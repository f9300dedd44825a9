"""Plain autograd on one sample: what every fast path here must equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradientspace.gradients.attach import eval_mode, only_active, only_differentiable


def plain_gradient(
    model: nn.Module,
    causal_lm: Any,
    adapter: str,
    parameters: list[nn.Parameter],
    input_ids: Tensor,
    labels: Tensor,
    loss: str = "mean",
) -> Tensor:
    """The gradient (D,) of one sample's loss through the model's own forward pass; input_ids, labels (T,)."""
    with (
        eval_mode(model),
        only_active(model, adapter),
        only_differentiable(model, parameters),
        torch.enable_grad(),
    ):
        logits = causal_lm(input_ids=input_ids[None], use_cache=False).logits[0, :-1].float()
        value = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction=loss)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([g.flatten().float() for g in flat])


def random_batch(causal_lm: Any, lengths: tuple[int, ...] = (12, 7)) -> dict[str, Tensor]:
    """Samples of random tokens whose second half is supervised, padded on the right; the same every time."""
    embedding = causal_lm.get_input_embeddings().weight
    vocabulary = embedding.shape[0]
    generator = torch.Generator().manual_seed(0)
    # special tokens sit at the ends of a vocabulary
    shape = (len(lengths), max(lengths))
    ids = torch.randint(vocabulary // 8, max(vocabulary // 2, 1), shape, generator=generator)
    position = torch.arange(max(lengths))
    length = torch.tensor(lengths)[:, None]
    mask = (position < length).long()
    labels = ids.masked_fill((position < length // 2) | (mask == 0), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(embedding.device) for key, value in batch.items()}


def largest_relative_error(gradients: Tensor, references: Tensor) -> float:
    """max over rows of |g' - g| / |g|; NaN where a reference is zero or not finite."""
    difference = torch.linalg.vector_norm(gradients - references, dim=1)
    return (difference / torch.linalg.vector_norm(references, dim=1)).max().item()
