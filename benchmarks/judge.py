"""Which of two methods writes better? A judge over any OpenAI-compatible endpoint, both orders, ties counted.

    python benchmarks/judge.py runs/mix --methods gradientspace single --domain creative \\
        --endpoint http://127.0.0.1:8000/v1 --model judge

Needs a run with generated answers (`evaluation.exact_match: true`). A method wins a prompt where the judge prefers it
in both orders; where the order decides, or the judge says so, it is a tie. `order_decides` says how often that was.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
from machine import describe

from gradientspace.errors import InputError
from gradientspace.evaluation import paired_bootstrap
from gradientspace.files import write_json
from gradientspace.progress import Progress
from gradientspace.run_folder import Run

QUESTION = """Two answers to a request follow. Which one is better: more fitting, more coherent, better written?
Reply with one word: FIRST, SECOND or TIE.

Request:
{prompt}

FIRST:
{first}

SECOND:
{second}
"""


class Judge:
    """Asks the model behind `endpoint` which of two answers is better."""

    def __init__(self, endpoint: str, model: str) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=endpoint.rstrip("/") + "/", headers=headers, timeout=120)
        self.model = model

    def prefers(self, prompt: str, first: str, second: str) -> int:
        """1 the first answer, -1 the second, 0 neither. Raises `InputError` where the endpoint does not answer."""
        question = QUESTION.format(prompt=prompt, first=first, second=second)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 8,
        }
        try:
            reply = self.client.post("chat/completions", json=body).raise_for_status().json()
            text = reply["choices"][0]["message"]["content"] or ""
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"the judge at {self.client.base_url} does not answer: {error}") from error
        word = re.search(r"\b(FIRST|SECOND|TIE)\b", text.upper())
        return {"FIRST": 1, "SECOND": -1}.get(word.group(1), 0) if word else 0


def compare(judge: Judge, rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Judge (prompt, a, b) rows in both orders: wins of a and b, ties, and the mean score of a with its interval."""
    scores, undecided = [], 0
    with Progress("judged", len(rows), "prompt") as progress:
        for prompt, a, b in rows:
            there, back = judge.prefers(prompt, a, b), -judge.prefers(prompt, b, a)
            scores.append(there if there == back else 0)
            undecided += there != back
            progress.advance()
    values = np.array(scores, dtype=float)
    return {
        "n": len(rows),
        "wins": scores.count(1),
        "losses": scores.count(-1),
        "ties": scores.count(0),
        "order_decides": undecided,
        "score": paired_bootstrap(values, ["all"] * len(values)),
    }


def answers(run: Run, methods: list[str], domain: str | None, limit: int) -> list[tuple[str, str, str]]:
    """(prompt, answer of the first method, of the second) of the run's evaluated samples."""
    table = pq.read_table(run.require("evaluation", f"eval {run.path}") / "samples.parquet")
    missing = [m for m in methods if f"answer:{m}" not in table.column_names]
    if missing:
        raise InputError(f"{run.path} has no answers of {missing[0]!r}: set evaluation.exact_match=true")
    columns = [table[c].to_pylist() for c in ("domain", "prompt", *(f"answer:{m}" for m in methods))]
    return [tuple(row[1:]) for row in zip(*columns, strict=True) if domain in (None, row[0])][:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run")
    parser.add_argument("--methods", nargs=2, default=["gradientspace", "single"])
    parser.add_argument("--domain", help="only rows of this domain")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--endpoint", required=True, help="for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4 prompts")
    options = parser.parse_args()
    rows = answers(Run.open(options.run), options.methods, options.domain, 4 if options.quick else options.limit)
    found = compare(Judge(options.endpoint, options.model), rows)
    a, b = options.methods
    print(f"{a} {found['wins']}, {b} {found['losses']}, ties {found['ties']} (order decides {found['order_decides']})")
    if options.json:
        setting = {"judge": options.model, "methods_judged": options.methods, "machine": describe()}
        write_json(options.json, {**setting, **found})


if __name__ == "__main__":
    main()
