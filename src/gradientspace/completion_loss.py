"""The training loss, with lm_head applied only where a token is supervised.

Most tokens of an instruction sample are prompt; their logits are never needed, and with a large vocabulary they are
most of what a step of a small model computes and keeps. This module imports transformers; import it late.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradientspace.gradients.head import Supervision, head_selects_rows, of_rows
from gradientspace.memory import repeated_size
from gradientspace.training_checkpoints import ResumableTrainer

_PART_TOKENS = 1024
"""A forward pass of more tokens, padding included, is no faster on a CPU (`benchmarks/training.py`)."""


class CompletionTrainer(ResumableTrainer):
    """Minimises the mean cross-entropy of the completion tokens of all batches of a step.

    Where a model does more to its logits than element by element, all of them are made, as transformers does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adapted: Any = self.model
        causal_lm = adapted.get_base_model()
        self.lm_head: Any = causal_lm.get_output_embeddings() if head_selects_rows(causal_lm) else None
        if self.lm_head is not None:
            self.compute_loss_func = completion_loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.lm_head is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with of_rows(self.lm_head, Supervision.from_labels(inputs["labels"], "sum").rows):
            return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """On a CPU, a batch in parts of similar length, whose gradients add up to its own: less padding and memory.

        A GPU is better off with the whole batch, and several processes would have to agree on the number of parts.
        """
        step = super().training_step
        whole = self.args.device.type != "cpu" or self.args.world_size > 1
        if self.lm_head is None or num_items_in_batch is None or whole:
            return step(model, inputs, num_items_in_batch)
        return torch.stack([step(model, part, num_items_in_batch) for part in parts(inputs)]).sum()


def parts(batch: dict[str, Tensor], max_tokens: int = _PART_TOKENS) -> list[dict[str, Tensor]]:
    """A batch (b, T) padded on the right as batches of at most `max_tokens` tokens (or one row), as wide as they need.

    Each holds rows of similar length. Widths repeat and numbers of rows are powers of two, so that their products
    repeat as well (see `repeated_size`). A batch that is small enough is left alone.
    """
    if batch["input_ids"].numel() <= max_tokens:
        return [batch]
    lengths = batch["attention_mask"].sum(dim=1)
    widths = [min(repeated_size(length), batch["input_ids"].shape[1]) for length in lengths.tolist()]
    rows, found = lengths.argsort(stable=True).tolist(), []
    while rows:
        n = 1 << (len(rows).bit_length() - 1)
        while n > 1 and n * widths[rows[n - 1]] > max_tokens:
            n //= 2
        part, rows = rows[:n], rows[n:]
        found.append({name: values[part, : widths[part[-1]]] for name, values in batch.items()})
    return found


def completion_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats, in float32: `outputs.logits` (1, n, V) are of the n supervised positions of labels (b, T).

    Their sum by the number of supervised tokens of the whole step, which the Trainer counts; their mean without it.
    """
    targets = Supervision.from_labels(labels, "sum").targets
    logits = outputs.logits.flatten(0, 1).float()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
