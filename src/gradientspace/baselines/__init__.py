"""What GradientSpace is compared with, trained and answered through the same code.

Every baseline uses the same splits, starts from the same adapter and spends the same tokens after the warm-up, except
where its name says otherwise. `groupings.py`: other ways of making groups. `adapters.py`: one adapter on everything.
`elrea.py`: an ensemble weighted by gradients. What a baseline leaves for evaluation is an `Arm`.
"""

from __future__ import annotations

from pathlib import Path

from gradientspace.arm import Arm
from gradientspace.baselines import adapters, elrea, groupings
from gradientspace.job import Job

__all__ = ["baseline_arm", "grouping_of", "train_baseline"]


def train_baseline(job: Job, name: str) -> None:
    """The stages of one baseline, all below `baselines/NAME`."""
    if name in adapters.TRAIN:
        adapters.TRAIN[name](job)
    elif name == elrea.NAME:
        elrea.train(job)
    else:
        groupings.train(job, name)


def baseline_arm(job: Job, name: str) -> Arm:
    """How a trained baseline answers every held-out row (in the order of `grouping.held_out`)."""
    if name in adapters.TRAIN:
        return adapters.arm(job, name)
    return elrea.arm(job) if name == elrea.NAME else groupings.arm(job, name)


def grouping_of(job: Job, name: str) -> Path | None:
    """The folder of a baseline's groups; None where it makes no groups."""
    return None if name in adapters.TRAIN else job.run.path / f"baselines/{name}/groups"
