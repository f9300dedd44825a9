"""Gradients kept in a file: opt-in, memory-mapped, and a broken pass resumes where it stopped.

The file is a plain safetensors file that is allocated in full first and then filled in: `gradients` (N, D)
float32, `losses` (N,), `norms` (N,) and `done` (N,) uint8. Its metadata says which weights, samples and
settings it belongs to. A row counts as done only once its numbers are on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradientspace.data import TokenisedSample
from gradientspace.errors import RunFolderError
from gradientspace.gradients.batching import GradientBatch

if TYPE_CHECKING:
    from gradientspace.gradients.engine import PerSampleGradients


class GradientStore:
    """N gradients in one safetensors file. Get one from `open`."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray], mapping: mmap.mmap) -> None:
        self.path = path
        self.gradients, self.losses = arrays["gradients"], arrays["losses"]
        self.norms, self.done = arrays["norms"], arrays["done"]
        self._mapping = mapping

    @classmethod
    def open(cls, path: str | Path, engine: PerSampleGradients, samples: Sequence[TokenisedSample]) -> GradientStore:
        """Open the store at `path`, or allocate it. Raises RunFolderError when it is of another run."""
        path = Path(path)
        belongs_to = fingerprint(engine, samples)
        if not path.exists():
            _allocate(path, len(samples), engine.dim, belongs_to)
        header, start = _read_header(path)
        if header.get("__metadata__", {}).get("belongs_to") != belongs_to:
            raise RunFolderError(
                f"{path}: gradients of other weights, samples or settings; delete it or give another path"
            )
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0)
        arrays = {}
        for name, dtype in (("gradients", "<f4"), ("losses", "<f4"), ("norms", "<f4"), ("done", "u1")):
            shape, (first, _) = header[name]["shape"], header[name]["data_offsets"]
            flat = np.frombuffer(mapping, dtype, count=math.prod(shape), offset=start + first)
            arrays[name] = flat.reshape(shape)
        return cls(path, arrays, mapping)

    def read(self, indices: list[int]) -> GradientBatch | None:
        """The batch of these samples, or None unless every one of them is there."""
        if not self.done[indices].all():
            return None
        return GradientBatch(
            torch.tensor(indices),
            torch.from_numpy(self.gradients[indices]),
            torch.from_numpy(self.losses[indices]),
            torch.from_numpy(self.norms[indices]),
        )

    def write(self, batch: GradientBatch) -> None:
        """Keep a batch. Its rows are on disk before they are marked as done."""
        indices = batch.indices.numpy()
        self.gradients[indices] = batch.gradients.cpu().numpy()
        self.losses[indices] = batch.losses.cpu().numpy()
        self.norms[indices] = batch.norms.cpu().numpy()
        self._mapping.flush()
        self.done[indices] = 1
        self._release()

    def _release(self) -> None:
        """Tell the system that written pages need not stay in memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


def fingerprint(engine: PerSampleGradients, samples: Sequence[TokenisedSample]) -> str:
    """sha256 of what the gradients depend on: settings, layout, adapter weights, tokens and labels.

    The base model is represented by its shapes only; hashing gigabytes at every start is not worth it.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(engine.settings, sort_keys=True).encode())
    for block, parameter in zip(engine.layout, engine.parameters(), strict=True):
        digest.update(f"{block.name} {block.shape}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    for sample in samples:
        digest.update(np.asarray(sample.input_ids, dtype="<i8").tobytes())
        digest.update(np.asarray(sample.labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def _allocate(path: Path, n: int, dim: int, belongs_to: str) -> None:
    sizes = {"gradients": (4 * n * dim, "F32", [n, dim]), "losses": (4 * n, "F32", [n])}
    sizes |= {"norms": (4 * n, "F32", [n]), "done": (n, "U8", [n])}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "belongs_to": belongs_to}}
    offset = 0
    for name, (size, dtype, shape) in sizes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            # reserve the space now: a full disk under a memory map is a crash, not an error
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunFolderError(
            f"{path}: {offset / 2**30:.2f} GiB for {n} gradients of {dim:,} numbers: {error.strerror}; "
            "free some space or stream without a store"
        ) from error


def _read_header(path: Path) -> tuple[dict, int]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(length)), 8 + length
    except (OSError, struct.error, ValueError) as error:
        raise RunFolderError(f"{path}: not a gradient store ({error}); delete it or give another path") from error
