"""Early stopping: the adapter with the lowest held-out loss is kept, and a training without hope ends.

transformers' own callback needs a checkpoint on disk for every evaluation; an adapter is small enough to be kept in
memory. This module imports transformers; import it late.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class KeepBest(TrainerCallback):
    """After every evaluation: remember the best adapter; stop after `patience` evaluations without a better one.

    At the end of the training the best adapter is put back. `evaluations` are `{"step", "loss"}`, in nats: the mean
    over batches of the token mean.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss = float("inf")
        self.best_step = 0
        self.without_better = 0
        self.evaluations: list[dict[str, float]] = []
        self._best: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict, model: Any, **_: Any) -> None:
        loss = float(metrics["eval_loss"])
        self.evaluations.append({"step": state.global_step, "loss": round(loss, 5)})
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.without_better = loss, state.global_step, 0
            self._best = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            return
        self.without_better += 1
        control.should_training_stop = self.without_better >= self.patience

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._best:
                    parameter.copy_(self._best[name])

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint holds of it: tensors and JSON-able values."""
        values = {"best_step": self.best_step, "without_better": self.without_better, "evaluations": self.evaluations}
        # JSON has no infinity: no evaluation yet is no value.
        return self._best, values | ({"best_loss": self.best_loss} if self._best else {})

    def load(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._best = tensors
        for name, value in values.items():
            setattr(self, name, value)
