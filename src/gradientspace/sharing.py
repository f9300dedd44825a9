"""Stages that several runs have in common are made once: a run takes a finished stage over from another one.

A stage is the same where its seed, the options that it reads, and the contents of the stages it is made from are the
same. Files are hard links where the file system has them; a finished stage is never written to, so that is safe.
"""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gradientspace.config import GradientSpaceConfig

_TRAINING = ("data", "lora", "training", "experts")
READS: dict[str, tuple[str, ...]] = {
    "data": ("data",),
    "warmup": ("data", "lora", "training", "warmup"),
    "clustering": ("data", "lora", "gradients", "clustering", "router.encoder_name_or_path"),
    "router": ("data", "clustering", "router", "evaluation.split"),
    "shared": _TRAINING,
    "single": _TRAINING,
    "experts/*": _TRAINING,
    "baselines/*/experts/*": _TRAINING,
    "baselines/single-*": (*_TRAINING, "clustering"),
    "baselines/elrea/base": _TRAINING,
    "baselines/elrea/features": ("data", "lora", "gradients"),
}
"""Stage -> the options it reads beside `model` and `seed`; a stage that is not named is never taken over."""
_UNREAD = {"warmup": ("training.num_train_epochs",)}


def options_read(stage: str, config: GradientSpaceConfig) -> dict[str, Any] | None:
    """Every option that the result of `stage` depends on; None for a stage that is always made anew."""
    sections = next((names for pattern, names in READS.items() if fnmatch(stage, pattern)), None)
    if sections is None:
        return None
    values = config.to_dict()
    read = {name: _at(values, name) for name in ("model", "seed", *sections)}
    for name in _UNREAD.get(stage, ()):
        section, option = name.split(".")
        read[section] = {k: v for k, v in read[section].items() if k != option}
    return read


def _at(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def link_folder(source: Path, target: Path) -> None:
    """The files of `source` in the existing folder `target`, as hard links or else copies."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:
            shutil.copyfile(path, copy)
