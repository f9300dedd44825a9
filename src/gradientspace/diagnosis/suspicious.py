"""Rows that fight everything: likely mislabelled or off-template.

Two signs, both under the warm-up adapter, which has not seen the rows: the gradient pulls against the mean gradient of
the other rows with such prompts, and the loss is high. Each is made comparable by its median and median absolute
deviation; their sum ranks the rows, and those more than 3.5 deviations out are listed (the cut-off of Iglewicz and
Hoaglin, 1993).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradientspace.config import GradientSpaceConfig
from gradientspace.diagnosis.candidates import candidates
from gradientspace.diagnosis.survey import Survey
from gradientspace.plain_text import one_line

DEVIATIONS = 3.5
_LISTED = 200
_TO_SIGMA = 1.4826
"""The median absolute deviation of a normal distribution times this is its standard deviation."""


def suspicion(survey: Survey, k: int, config: GradientSpaceConfig) -> dict[str, np.ndarray]:
    """Scores (n,) by gradient conflict, by loss and combined, larger is more suspicious; NaN without a gradient."""
    rows = np.concatenate(survey.halves)
    labels = candidates(survey, rows, k, config)[0].labels if k > 1 else np.zeros(len(rows), dtype=int)
    gram = survey.gram[np.ix_(rows, rows)]
    peers = (labels[:, None] == labels[None, :]) & ~np.eye(len(rows), dtype=bool)
    alignment = (gram * peers).sum(axis=1) / np.maximum(peers.sum(axis=1), 1)
    conflict, loss = deviations(-alignment), deviations(np.log(np.maximum(survey.losses[rows], 1e-6)))
    scores = {}
    for name, values in (("conflict", conflict), ("loss", loss), ("combined", deviations(conflict + loss))):
        scores[name] = np.full(len(survey.samples), np.nan)
        scores[name][rows] = values
    return scores


def deviations(values: np.ndarray) -> np.ndarray:
    """Distance from the median in robust standard deviations; all 0 where half of the values are the same."""
    centred = values - np.median(values)
    scale = _TO_SIGMA * np.median(np.abs(centred))
    return centred / scale if scale > 0 else np.zeros_like(centred)


def suspicious_rows(survey: Survey, k: int, config: GradientSpaceConfig) -> dict[str, Any]:
    """How many rows of the sample stand out, and the list, worst first."""
    scores = suspicion(survey, k, config)
    combined = np.nan_to_num(scores["combined"], nan=-np.inf)
    out = [i for i in np.argsort(-combined, kind="stable").tolist() if combined[i] > DEVIATIONS]
    listed = [
        {
            "id": survey.samples[i].id,
            "row": survey.samples[i].row,
            "source": survey.samples[i].source,
            "deviations": round(float(combined[i]), 2),
            "conflict": round(float(scores["conflict"][i]), 2),
            "loss": round(float(survey.losses[i]), 3),
            "prompt": one_line(survey.samples[i].prompt, 160),
            "response": one_line(survey.samples[i].reference, 160),
        }
        for i in out[:_LISTED]
    ]
    return {"examined": len(survey.samples), "found": len(out), "rows": listed}
