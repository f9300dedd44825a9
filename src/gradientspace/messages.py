"""What processes of one run tell each other, as bytes: JSON, and tensors beside it. Nothing in it can run code.

A message is the length of its JSON, eight bytes, the JSON, and the tensors as safetensors; in the JSON a tensor is
`{"tensor": number}`, an array `{"array": number}`, and every dictionary stands below the key "values".
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

_LENGTH = 8


def pack(value: Any) -> bytes:
    """Bytes of None, numbers, strings, tensors and arrays, in lists and dictionaries with strings as keys.

    A tuple comes back as a list. Raises `TypeError` for anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return len(text).to_bytes(_LENGTH, "little") + text + (save(tensors) if tensors else b"")


def unpack(data: bytes) -> Any:
    """What `pack` was given."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return _restored(json.loads(data[_LENGTH:end]), load(data[end:]) if len(data) > end else {})


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"values": {key: _plain(item, tensors) for key, item in value.items()}}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        number = str(len(tensors))
        tensors[number] = torch.as_tensor(value).cpu().contiguous().clone()  # safetensors refuses shared memory
        return {"array" if isinstance(value, np.ndarray) else "tensor": number}
    raise TypeError(f"a message cannot hold {type(value).__name__}")


def _restored(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()  # fmt: skip
    if kind == "values":
        return {key: _restored(item, tensors) for key, item in content.items()}
    return tensors[content].numpy() if kind == "array" else tensors[content]
