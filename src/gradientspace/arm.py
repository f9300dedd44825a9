"""One trained method, ready to be measured: its adapters, and which of them answers each row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Arm:
    """Adapters and the way they answer n rows."""

    adapters: list[Path]
    """E adapter folders; empty for the base alone."""
    choice: np.ndarray
    """(n,) the adapter of each row (-1: the base), or (n, E) the weights of all of them in an ensemble."""
    trained: list[Path]
    """The adapters whose training the method paid for after the warm-up."""

    @property
    def ensemble(self) -> bool:
        return self.choice.ndim == 2

    def of(self, rows: Sequence[int]) -> Arm:
        """The same method on some of its rows."""
        return Arm(self.adapters, self.choice[list(rows)], self.trained)

    def cost(self) -> dict[str, Any]:
        """Steps and tokens after the warm-up, adapter parameters to keep, and forward passes a token."""
        summaries = [json.loads((f / "training.json").read_text()) for f in self.trained]
        return {
            "steps": sum(s["steps"] for s in summaries),
            "tokens": sum(s["tokens"] for s in summaries),
            "parameters": sum(_adapter_numbers(f) for f in self.adapters),
            "passes_per_token": len(self.adapters) if self.ensemble else 1,
        }


def _adapter_numbers(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(folder / "adapter_model.safetensors"), "np") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
    return sum(rows * columns for rows, columns in shapes)
