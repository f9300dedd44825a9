"""How tensors reach a device without making anyone wait."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def on_device(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """`tensors` on `device`, in order; those that are there already are returned as they are.

    From the CPU to a CUDA device they go through pinned memory, and the call returns before they have arrived: what
    runs on the device's current stream afterwards finds them there, and the CPU goes on meanwhile.
    """
    pinned = device.type == "cuda"
    return [
        t.pin_memory().to(device, non_blocking=True) if pinned and t.device.type == "cpu" else t.to(device)
        for t in tensors
    ]
