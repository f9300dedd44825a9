"""Theorem 3 where everything is known: constant-step SGD on a mixture of planted quadratics.

Sample i of cluster k has the loss |theta - a_i|^2 / 2 with a_i = mu_k + noise, so its gradient is theta - a_i, the
variance of gradients is that of the a_i at every theta, and at step eta and batch B the expected squared gradient norm
of the objective that SGD draws from settles at eta S / (B (2 - eta)), S being that variance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DIM = 50
CLUSTERS = 4
ROWS = 2_000
STEP = 0.1
BATCH = 4
SPREAD = 1.0


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Targets a_i (ROWS, DIM) and clusters (ROWS,); each cluster has its own noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(ROWS) % CLUSTERS
    centres = SPREAD * generator.normal(size=(CLUSTERS, DIM))
    noise = np.linspace(0.5, 1.0, CLUSTERS)
    return centres[labels] + noise[labels, None] * generator.normal(size=(ROWS, DIM)), labels


def sgd(targets: np.ndarray, objective: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Squared gradient norm of |theta - objective|^2 / 2 before every step of SGD on `targets` from zero: (steps,)."""
    generator = np.random.default_rng(seed)
    theta, norms = np.zeros(DIM), np.empty(steps)
    for t in range(steps):
        norms[t] = ((theta - objective) ** 2).sum()
        theta = theta - STEP * (theta - targets[generator.integers(len(targets), size=BATCH)].mean(axis=0))
    return norms


def variance(rows: np.ndarray) -> float:
    return float(((rows - rows.mean(axis=0)) ** 2).sum() / len(rows))


def measure_quadratics(steps: int) -> dict[str, Any]:
    """Floors of the mixture and of each cluster, measured over the second half of the steps and predicted.

    `expert_steps` is what an expert has at equal total steps; `left` the share of its first squared norm that is left
    then, beside the mixture's after all of them.
    """
    targets, labels = planted()
    half = steps // 2
    short = max(2, min(steps, 40))  # the transient is over soon at this step
    mixture = sgd(targets, targets.mean(axis=0), steps, seed=1)
    rows = []
    for k in range(CLUSTERS):
        members = targets[labels == k]
        norms = sgd(members, members.mean(axis=0), steps, seed=2 + k)
        own_steps = max(1, round(short * len(members) / len(targets)))
        rows.append(
            {
                "cluster": k,
                "variance": variance(members),
                "floor": float(norms[half:].mean()),
                "predicted": STEP * variance(members) / (BATCH * (2 - STEP)),
                "expert_steps": own_steps,
                "left": float(norms[own_steps] / norms[0]),
                "mixture_on_this_cluster": float(sgd(targets, members.mean(axis=0), steps, seed=1)[half:].mean()),
            }
        )
    return {
        "step": STEP,
        "batch": BATCH,
        "steps": steps,
        "mixture": {
            "variance": variance(targets),
            "floor": float(mixture[half:].mean()),
            "predicted": STEP * variance(targets) / (BATCH * (2 - STEP)),
            "transient_steps": short,
            "left": float(mixture[short - 1] / mixture[0]),
        },
        "clusters": rows,
    }
