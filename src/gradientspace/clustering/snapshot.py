"""The clusterer's state on disk: safetensors and JSON, exact to the bit, so that a broken pass goes on from it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gradientspace.clustering.centroids import Centroids
from gradientspace.damage import reading, require
from gradientspace.errors import RunFolderError
from gradientspace.tensor_files import read_aligned

STATE_FILE, RECORD_FILE = "clusterer.safetensors", "clusterer.json"


def write_snapshot(
    folder: Path, parameters: dict[str, Any], record: dict[str, Any], state: Centroids, tensors: dict[str, Tensor]
) -> None:
    """Write parameters, what was learnt (`record`, JSON-able, and `tensors`) and the moving state."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors | state.tensors()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / STATE_FILE)
    if not isinstance(parameters["random_state"], int | None):
        parameters["random_state"] = None  # a generator object cannot be written; it is not used any more
    record = {"parameters": parameters, "centred": state.centred, **record}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_snapshot(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record (with `parameters` and `centred`) and all tensors. Raises RunFolderError for a missing file."""
    for name in (STATE_FILE, RECORD_FILE):
        if not (folder / name).is_file():
            raise RunFolderError(f"no clusterer in {folder}: {name} is missing")
    with reading(folder, "cluster the run again"):
        record, tensors = json.loads((folder / RECORD_FILE).read_text()), read_aligned(folder / STATE_FILE, device)
        k, matrix = record["n_clusters"], tensors["matrix"]
        require(type(k) is int and k >= 1, f"n_clusters is {k!r}")
        require(type(record["centred"]) is bool and type(record["torch_out"]) is bool, "a flag is none")
        require(matrix.ndim == 2 and matrix.dtype in (torch.float32, torch.float64), "the matrix is none")
        lengths = torch.linalg.vector_norm(matrix[:-1].double(), dim=1)
        require(((lengths - 1).abs() < 0.01).all(), "a centroid or direction has not unit length")
        require(float(torch.linalg.vector_norm(matrix[-1].double())) < 1.01, "the mean is longer than what it is of")
        require(len(matrix) >= k + 2 and matrix.shape[1] == record["n_features_in"], f"matrix {tuple(matrix.shape)}")
        for name in ("filled", "counts"):
            require(
                tensors[name].shape == (k,) and tensors[name].dtype == torch.int64 and (tensors[name] >= 0).all(), name
            )
        require(tensors["strengths"].shape == (k,) and torch.isfinite(tensors["strengths"]).all(), "strengths")
        for name in ("singular_values", "explained_energy"):
            require(tensors[name].ndim == 1 and tensors[name].is_floating_point(), name)
        _check_caches(record["parameters"], tensors, k)
    return record, tensors


def _check_caches(parameters: dict[str, Any], tensors: dict[str, Tensor], k: int) -> None:
    """Caches that fit their counters, and counters that fit the cache size."""
    caches, filled, size = tensors["caches"], tensors["filled"], parameters["cache_size"]
    require(type(size) is int and bool(((filled >= 0) & (filled <= size)).all()), f"cache_size {size!r}")
    # At most `size` unit vectors, each beside the others or in one sum.
    require(
        caches.is_floating_point()
        and float(caches.abs().max().nan_to_num(torch.inf) if caches.numel() else 0) <= 1.1 * size,
        "the caches are out of range",
    )
    width = tensors["matrix"].shape[1]
    shape = (k, int(filled.max()), width) if parameters["update"] == "svd" else (k, width)
    require(caches.shape == shape, f"caches {tuple(caches.shape)}")
