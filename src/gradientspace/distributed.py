"""What ranks other than 0 do: wait for an order of rank 0, work on it, wait again.

    torchrun --nproc-per-node 4 -m gradientspace run CONFIG

Rank 0 runs the command as if it were alone and writes the run folder. It asks for help twice: in stage II, where every
rank computes its share of the gradients and clusters it (`online_pass.py`), and for experts, of which every free rank
trains the next one. `ranks.py` holds the messages, and the end when a rank is lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from gradientspace.errors import GradientSpaceError, LostRankError
from gradientspace.grouping import Groups, help_with_groups
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.ranks import ranks
from gradientspace.run_folder import Run


def serve() -> int:
    """Take orders until rank 0 is done; returns the exit code. An error names this rank."""
    here = ranks()
    warnings.simplefilter("ignore")  # rank 0 has the same to say
    try:
        while (order := here.broadcast(None)) is not None:
            name, path, lenders, arguments = order
            WORK[name](job_of(path, tuple(lenders)), **arguments)
        here.leave()
    except KeyboardInterrupt:
        return 130
    except LostRankError:
        raise
    except Exception as error:
        here.first_to_say()
        kind = type(error) if isinstance(error, GradientSpaceError) else GradientSpaceError
        text = str(error) if isinstance(error, GradientSpaceError) else f"{type(error).__name__}: {error}"
        raise kind(f"rank {here.rank} of {here.size}: {text}") from error
    return 0


@cache
def job_of(path: str, lenders: tuple[str, ...]) -> Job:
    """One job a run folder: base and data are loaded once for all orders."""
    run = Run.open(path)
    run.lenders = [Run.open(lender) for lender in lenders]
    return Job(run)


def help_cluster(job: Job) -> None:
    with lora(job.base, job.config.lora, start=job.run.path / "warmup", seed=job.config.seed) as model:
        help_with_groups(model, job.data, job.config)


def help_experts(job: Job, prefix: str, groups: dict[str, Any], inputs: list[str]) -> None:
    job.train_experts(prefix, Groups(**groups), inputs=tuple(inputs))


WORK: dict[str, Callable[..., Any]] = {"cluster": help_cluster, "experts": help_experts}
"""Order -> what is done about it."""
