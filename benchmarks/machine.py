"""What a benchmark's numbers depend on beside the code: versions, machine and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import torch


def describe(*packages: str) -> dict[str, Any]:
    """JSON-able: processor, cores, threads, GPU, versions of torch and `packages`, date."""
    versions = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    except OSError:
        return platform.processor()
