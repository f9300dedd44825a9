"""`gradientspace diagnose CONFIG`: should this mix be split at all? Minutes, before anyone trains an expert.

    job      = Job(Run.create(config))       # a run folder of its own: resumes, keeps its evidence
    survey   = survey_gradients(job)         # warm-up on a slice, inner products of a sample of unit gradients
    evidence = weigh(survey)                 # K, conflicts, variance, held-out routed alignment of every grouping
    pilot    = run_pilot(job, ...)           # one adapter against K routed experts, equal steps, on dev
    without  = leave_out(job, evidence)      # no split: is the rest better without a source that pulls against it?
    verdict  = conclude(evidence)            # keep one adapter, split into K, drop or fix a source

The verdict rests on what the pilot's short trainings did on dev; gradients only order what is tried.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gradientspace.config import GradientSpaceConfig
from gradientspace.diagnosis.candidates import best_candidate
from gradientspace.diagnosis.evidence import weigh
from gradientspace.diagnosis.left_out import leave_out
from gradientspace.diagnosis.pilot import run_pilot
from gradientspace.diagnosis.survey import Survey, survey_gradients
from gradientspace.diagnosis.words import conclude, gains
from gradientspace.files import write_json
from gradientspace.job import Job
from gradientspace.pipeline import read_data
from gradientspace.run_folder import Run

__all__ = ["diagnose"]
_SUFFIX = "-diagnosis"


def diagnose(config: GradientSpaceConfig) -> tuple[dict[str, Any], Path]:
    """Diagnose the mix of `config`; what is in the diagnosis's folder already is not done again.

    Returns what `diagnosis.json` holds, and that file's folder.
    """
    own = dataclasses.replace(config, name=f"{config.name or 'run'}{_SUFFIX}")
    job = Job(Run.create(own.validate()))
    with job.run.lock():
        read_data(job)
        survey = survey_gradients(job)
        folder = job.run.stage("evidence", lambda to: _write_evidence(to, job, survey), inputs=("survey",))
        evidence = json.loads((folder / "evidence.json").read_text())
        pilot, least = _pilot(job, survey, evidence), job.config.diagnosis.min_gain
        left_out = [] if gains(pilot, least) else leave_out(job, evidence)
        found = conclude({**evidence, "pilot": pilot, "left_out": left_out, "min_gain": least})
        write_json(job.run.path / "diagnosis.json", found)
    return found, job.run.path


def _write_evidence(folder: Path, job: Job, survey: Survey) -> None:
    write_json(folder / "evidence.json", weigh(survey, job.config))


def _pilot(job: Job, survey: Survey, evidence: dict[str, Any]) -> dict[str, Any] | None:
    """None where there is nothing to try: the spectrum shows one group only."""
    if evidence["k"] == 1:
        return None
    candidate = best_candidate(survey, evidence, job.config)
    return run_pilot(job, candidate)
