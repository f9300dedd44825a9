"""The demo's options that differ from the package's defaults, fixed before its table was looked at."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, dict[str, Any]] = {
    # Rank 4 and one pass for each phase: enough for one skill, tight for four and for telling them apart.
    "lora": {"lora_r": 4, "lora_alpha": 8},
    "training": {"learning_rate": 1e-2, "num_train_epochs": 2.0, "warmup_ratio": 0.1},
    "data": {"warmup_fraction": 0.08, "max_length": 128},
    "warmup": {"num_train_epochs": 1.0},
    # K is given: parallel analysis saturates here, and only the largest eigengap says 4 (3 directions, centred).
    # 8 directions leave room for what the samples of one skill differ in.
    "clustering": {"n_clusters": 4, "n_components": 8},
    "evaluation": {"max_new_tokens": 24, "exact_match": True, "per_device_eval_batch_size": 80},
}
"""Section -> option -> value, as in a config file."""
