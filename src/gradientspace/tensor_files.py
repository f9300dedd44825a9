"""Tensors read back from a safetensors file such that what is made of them has the same bits as before."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def read_aligned(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of `path`, each in memory of its own.

    In the file a tensor begins at any byte, and `load_file` maps it as it lies there. Some processors' matrix products
    round an unaligned operand in another way, so what goes on from the file would differ from what was never stopped.
    """
    return {name: value.clone() for name, value in load_file(path, device=device).items()}
