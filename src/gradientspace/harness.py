"""Any task of lm-evaluation-harness on a run: every request is answered by the expert its context is routed to.

    import lm_eval
    from gradientspace.harness import RoutedLM

    lm_eval.simple_evaluate(RoutedLM("runs/mix", routes="routes.jsonl"), tasks=["gsm8k"])

Needs the extra `harness` (`pip install 'gradientspace[harness]'`). `routes` gets one line a request: kind, expert,
probability, and the SHA-256 of the context.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM  # type: ignore

from gradientspace.inference import Experts, adapters_of
from gradientspace.models import load_base, load_tokenizer
from gradientspace.router import Router
from gradientspace.run_folder import Run


class RoutedLM(HFLM):
    """lm-evaluation-harness's model class over base, experts and router of a finished run.

    Scoring and generation are the harness's own, on the base with one adapter active; what is here decides which.
    `options` go to `HFLM`, `batch_size` for one. Raises `RunFolderError` where experts or router are missing.
    """

    def __init__(self, run: str | Path, routes: str | Path | None = None, **options: Any) -> None:
        opened = Run.open(run)
        folders, _ = adapters_of(opened)
        self.router = Router.load(opened.require("router", f"router {run}"))
        self.routes = Path(routes) if routes else None
        base = load_base(opened.config.model)
        super().__init__(base, tokenizer=load_tokenizer(opened.config.model), **options)
        self.experts = Experts(base, folders)
        self._expert_is_chosen = False

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of every (context, continuation), as the harness has them."""
        answer = super()._loglikelihood_tokens
        if self._expert_is_chosen:  # a window of a text whose expert is active already
            return answer(requests, *arguments, **options)
        contexts = [r[0][0] for r in requests]
        return self._routed("loglikelihood", contexts, requests, lambda part: answer(part, *arguments, **options))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts. There is no prompt, so the text itself is routed."""
        answer, texts = super().loglikelihood_rolling, [r.args[0] for r in requests]
        return self._routed("rolling", texts, requests, lambda part: answer(part, disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled answers, as each request asks."""
        answer, contexts = super().generate_until, [r.args[0] for r in requests]
        return self._routed("generate", contexts, requests, lambda part: answer(part, disable_tqdm))

    def _routed(self, kind: str, contexts: list[str], requests: Sequence[Any], answer: Callable[[Any], list]) -> list:
        """`answer` of the requests of each expert, with that expert active, back in the requests' order."""
        if not requests:
            return []
        probabilities = self.router.predict_proba(contexts)
        chosen = probabilities.argmax(axis=1)
        results: list[Any] = [None] * len(requests)
        for expert in np.unique(chosen).tolist():
            rows = np.flatnonzero(chosen == expert).tolist()
            with self._answering_with(expert):
                for i, result in zip(rows, answer([requests[i] for i in rows]), strict=True):
                    results[i] = result
        self._log(kind, contexts, chosen, probabilities.max(axis=1))
        return results

    @contextlib.contextmanager
    def _answering_with(self, expert: int) -> Iterator[None]:
        with self.experts.active(expert) as model:
            self._model, self._expert_is_chosen = model, True
            try:
                yield
            finally:
                self._expert_is_chosen = False

    def _log(self, kind: str, contexts: list[str], chosen: np.ndarray, probabilities: np.ndarray) -> None:
        if self.routes is None:
            return
        with self.routes.open("a", encoding="utf-8") as file:
            for context, expert, probability in zip(contexts, chosen.tolist(), probabilities.tolist(), strict=True):
                digest = hashlib.sha256(context.encode()).hexdigest()
                line = {"kind": kind, "expert": expert, "probability": probability, "context_sha256": digest}
                file.write(json.dumps(line) + "\n")
