"""The clusterer's state on disk: safetensors and JSON, exact to the bit, so that a broken pass goes on from it."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from gradientspace.clustering.centroids import Centroids
from gradientspace.errors import RunFolderError

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
    return json.loads((folder / RECORD_FILE).read_text()), load_file(folder / STATE_FILE, device=device)
