"""The self-test before the first request: does every name really answer with its own adapter's weights?

Plain PEFT reads a few canary texts under the base and under each adapter: their fingerprints. What is to be served
must show, for every name, its own adapter's fingerprint, with requests for all names mixed and concurrent, for there
are engines that answer a request with another adapter when the batch is full, silently.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradientspace.errors import GradientSpaceError
from gradientspace.inference import BASE, Experts, adapters_of, named_folders
from gradientspace.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gradientspace.inference import RoutedModel
    from gradientspace.run_folder import Run

CANARIES = (
    "The quick brown fox jumps over the lazy dog, and 17 + 25 = 42.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Write a short poem about the sea. What is the capital of France?",
    "Die Summe von drei und vier ist sieben; la somme de deux et deux est quatre.",
)
_LENGTH = 24
"""Tokens of a canary that are read, the same for all."""
WRITTEN = 8
"""Tokens that are then written greedily. Only those are compared: asking for the log-probabilities of a prompt's own
tokens (`echo`) stops vLLM 0.32 on a CPU when it serves adapters."""
ASKED = 5
"""Likeliest tokens whose log-probabilities an engine is asked for at every step."""
_KNOWN = 20
"""Likeliest tokens that a fingerprint has at every step."""
_TOLERANCE = {torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
"""Largest difference of stacked and plain logits, as a share of the largest logit (at least 1)."""
_ROUNDS = 4
"""How often an upstream is asked for every canary under every name, all at once."""
NATS = 0.05
"""Mean difference of log-probabilities that an upstream is allowed: kernels and bfloat16 round otherwise."""


class ParityError(GradientSpaceError):
    """A name does not answer with its own adapter: nothing is served."""


@dataclass(frozen=True)
class Fingerprint:
    """What one name makes of one canary: its greedy continuation."""

    texts: list[str]
    """The continuation, token by token."""
    tops: list[dict[str, float]]
    """At every step the likeliest tokens, as texts, and their log-probabilities."""

    def distance(self, known: Fingerprint) -> float:
        """Mean absolute difference in nats from `known`, over tokens that both have, up to where the texts part."""
        differences = []
        for text, top, known_text, known_top in zip(self.texts, self.tops, known.texts, known.tops, strict=False):
            differences += [abs(p - known_top[token]) for token, p in top.items() if token in known_top]
            if text != known_text:
                break
        mean = sum(differences) / len(differences) if differences else math.inf
        return mean if math.isfinite(mean) else math.inf


Fingerprints = dict[str, list[Fingerprint]]
"""Name -> one fingerprint a canary."""


def canaries(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the canaries, all of the same length."""
    encoded: Any = tokenizer(list(CANARIES))["input_ids"]
    return [(ids * _LENGTH)[:_LENGTH] for ids in encoded]


# --------------------------------------------------------------------------- references


def plain_logits(base: PreTrainedModel, folders: Mapping[str, Path], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of plain PEFT after the first and after the last token of every canary: name -> (n, 2, V)."""
    return dict(_each(base, folders, lambda model: model(input_ids=ids).logits[:, [0, -1]].float().cpu()))


def fingerprints(
    base: PreTrainedModel, folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase
) -> Fingerprints:
    """The fingerprints of plain PEFT."""
    ids = torch.tensor(canaries(tokenizer), device=base.device)

    def text(token: int) -> str:
        return str(tokenizer.decode([token]))

    def read(model: Any) -> list[Fingerprint]:
        prints = [Fingerprint([], []) for _ in CANARIES]
        longer = ids
        for _ in range(WRITTEN):
            top = model(input_ids=longer).logits[:, -1].float().log_softmax(-1).topk(_KNOWN)
            longer = torch.cat([longer, top.indices[:, :1]], dim=1)
            for known, tokens, values in zip(prints, top.indices.tolist(), top.values.tolist(), strict=True):
                known.texts.append(text(tokens[0]))
                # Two tokens may read alike, parts of a character for instance: the likelier one counts.
                known.tops.append({text(t): p for t, p in reversed(list(zip(tokens, values, strict=True)))})
        return prints

    return dict(_each(base, folders, read))


def recorded_fingerprints(run: Run, tokenizer: PreTrainedTokenizerBase, with_shared: bool) -> Fingerprints:
    """The run's fingerprints, from `fingerprints.json` beside it or made now and kept there.

    So only the first start of a proxy loads the base; later ones, on other machines too, need no weights of it.
    """
    from gradientspace.files import digest, write_json
    from gradientspace.models import load_base

    experts, shared = adapters_of(run)
    folders = named_folders(experts, shared if with_shared else None)
    weights = {
        name: hashlib.sha256((f / "adapter_model.safetensors").read_bytes()).hexdigest() for name, f in folders.items()
    }
    key = digest([weights, run.config.to_dict()["model"], canaries(tokenizer)])
    path = run.path / "fingerprints.json"
    if path.is_file():
        recorded = json.loads(path.read_text())
        if recorded["of"] == key:
            return {name: [Fingerprint(**f) for f in prints] for name, prints in recorded["fingerprints"].items()}
    made = fingerprints(load_base(run.config.model), folders, tokenizer)
    values = {name: [asdict(f) for f in prints] for name, prints in made.items()}
    try:
        write_json(path, {"of": key, "fingerprints": values})
    except OSError as error:
        say(f"{path} could not be written ({error}): the next start makes the fingerprints again")
    return made


def _each(base: PreTrainedModel, folders: Mapping[str, Path], function: Callable[[Any], Any]) -> list[tuple[str, Any]]:
    """(name, function(model)) under the base and under every adapter."""
    results = []
    with torch.inference_mode(), Experts(base, list(folders.values())) as experts:
        for number, name in [(BASE, "base"), *enumerate(folders)]:
            with experts.active(number) as model:
                results.append((name, function(model)))
    return results


# ---------------------------------------------------------------------- the built-in backend


def check_stacked(model: RoutedModel, expected: Mapping[str, torch.Tensor]) -> None:
    """Stacked experts in mixed batches against `plain_logits`. Raises `ParityError`."""
    _check_distinct(list(expected), lambda name: not torch.equal(expected[name], expected["base"]))
    ids = canaries(model.tokenizer)
    rows = [(name, i) for i in range(len(ids)) for name in expected]
    random.Random(0).shuffle(rows)
    batch = torch.tensor([ids[i] for _, i in rows], device=model.experts.model.device)
    with torch.inference_mode(), model.experts.batch([model.row(name) for name, _ in rows]) as stacked:
        last = stacked(input_ids=batch).logits[:, -1].float().cpu()
        first = stacked(input_ids=batch[:, :1]).logits[:, -1].float().cpu()  # one token a row runs another product
    share = _TOLERANCE.get(model.experts.model.dtype, _HALF_TOLERANCE)
    for (name, i), found in zip(rows, torch.stack([first, last], dim=1), strict=True):
        error = float((found - expected[name][i]).abs().max())
        limit = share * max(1.0, float(expected[name][i].abs().max()))
        if not error <= limit:  # also where it is not a number
            raise ParityError(f"{name} differs from plain PEFT by {error:.2g} in a logit, the limit is {limit:.2g}")


# ------------------------------------------------------------------------------- an upstream


async def check_upstream(
    ask: Callable[[str, list[int]], Awaitable[Fingerprint]],
    ids: Sequence[list[int]],
    expected: Fingerprints,
    tolerance: float = NATS,
) -> None:
    """Every canary under every name, several times, all at once. Raises `ParityError`.

    `ask(name, canary)` is one request to the upstream. An answer must lie within `tolerance` nats of its
    own name's fingerprint, and no other name's may be nearer.
    """
    _check_distinct(list(expected), lambda name: expected[name] != expected["base"])
    asked = [(name, i) for _ in range(_ROUNDS) for i in range(len(ids)) for name in expected]
    random.Random(0).shuffle(asked)
    found = await asyncio.gather(*(ask(name, ids[i]) for name, i in asked), return_exceptions=True)
    failed = next((result for result in found if isinstance(result, BaseException)), None)
    if failed is not None:  # only after all have ended: none is left running
        raise failed
    for (name, i), fingerprint in zip(asked, found, strict=True):
        assert isinstance(fingerprint, Fingerprint)
        distances = {other: fingerprint.distance(prints[i]) for other, prints in expected.items()}
        nearest = min(distances, key=lambda other: (distances[other], other != name))
        if nearest != name:
            raise ParityError(
                f"the upstream answered a request for {name} as {nearest} does (mean difference of log-probabilities "
                f"{distances[nearest]:.4f} nats, from {name} {distances[name]:.4f}): it mixes up its adapters. "
                "vLLM needs one LoRA slot more than adapters (--max-loras)"
            )
        if not distances[name] <= tolerance:
            raise ParityError(
                f"the upstream's {name} differs from plain PEFT by {distances[name]:.4f} nats a token, the limit is "
                f"{tolerance}: does it serve this run's base and adapters?"
            )


def _check_distinct(names: Sequence[str], differs: Callable[[str], bool]) -> None:
    for name in names:
        if name != "base" and not differs(name):
            raise ParityError(f"{name} answers exactly like the base: its adapter does nothing")
