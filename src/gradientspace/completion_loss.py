"""The training loss, with lm_head applied only where a token is supervised.

Most tokens of an instruction sample are prompt; their logits are never needed, and with a large vocabulary they are
most of what a step of a small model computes and keeps. This module imports transformers; import it late.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gradientspace.gradients.head import Supervision, head_selects_rows, of_rows
from gradientspace.training_checkpoints import ResumableTrainer


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


def completion_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats, in float32: `outputs.logits` (1, n, V) are of the n supervised positions of labels (b, T).

    Their sum by the number of supervised tokens of the whole step, which the Trainer counts; their mean without it.
    """
    targets = Supervision.from_labels(labels, "sum").targets
    logits = outputs.logits.flatten(0, 1).float()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
