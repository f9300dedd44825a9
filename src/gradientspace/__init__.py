"""GradientSpace: cluster an instruction mix by gradient, train one LoRA expert a cluster, route every prompt to one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradientspace.clustering import OnlineSVDClusterer
    from gradientspace.config import GradientSpaceConfig
    from gradientspace.gradients import PerSampleGradients
    from gradientspace.inference import RouteDecision, RoutedModel
    from gradientspace.pipeline import run
    from gradientspace.router import Router
    from gradientspace.run_folder import Run

__version__ = "0.1.0"

__all__ = [
    "GradientSpaceConfig",
    "OnlineSVDClusterer",
    "PerSampleGradients",
    "RouteDecision",
    "RoutedModel",
    "Router",
    "Run",
    "run",
]

_HOME = {
    "GradientSpaceConfig": "config",
    "OnlineSVDClusterer": "clustering",
    "PerSampleGradients": "gradients",
    "RouteDecision": "inference",
    "RoutedModel": "inference",
    "Router": "router",
    "Run": "run_folder",
    "run": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name at first use: `import gradientspace` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module 'gradientspace' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gradientspace.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
