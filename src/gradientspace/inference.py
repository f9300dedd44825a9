"""Route once, answer with one expert: one forward pass a token, no gradient and no ensemble.

`RoutedModel` is for use, over stacked experts. `Experts` is for evaluation: plain PEFT, one adapter active at a time,
so that the numbers of a run are those of the adapters as PEFT and every other engine runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradientspace.data import Sample, Template, pad_batch
from gradientspace.errors import ModelError, RunFolderError, UnsureError
from gradientspace.generation import Piece, Request, generate, left_pad
from gradientspace.gradients.head import Supervision, head_selects_rows, of_rows
from gradientspace.models import load_adapters, load_base, load_tokenizer, padding_id
from gradientspace.progress import Progress
from gradientspace.prompts import Prompt
from gradientspace.router import Fallback, Router
from gradientspace.stacked import BASE, StackedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gradientspace.run_folder import Run

SHARED = -2
"""In place of an expert's number: the adapter that all experts started from."""
REFUSED = -3
"""In place of an expert's number: nobody answers, since the router is too unsure."""


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Which expert answers a prompt, how sure the router is, and what came second."""

    expert: int
    """Number of the chosen expert; after a fallback `BASE` (-1), `SHARED` (-2) or `REFUSED` (-3)."""
    probability: float
    """Calibrated probability of the most probable expert."""
    runner_up: int | None
    """The second most probable expert; `None` with one expert."""
    fallback: bool
    """True where the probability was under the router's threshold, so that no expert answers."""

    @property
    def name(self) -> str:
        """`expert_0`, …, `shared` or `base`."""
        return expert_name(self.expert)

    def answering(self) -> int:
        """`expert`. Raises `UnsureError` where nobody answers."""
        if self.expert == REFUSED:
            raise UnsureError(
                f"the router gives its best expert a probability of {self.probability:.3f}, below its threshold: "
                "name the expert that should answer"
            )
        return self.expert


class Experts:
    """A base with several adapters: losses and answers of samples, each of which names its adapter.

    Samples are grouped by adapter, and each group runs as ordinary PEFT inference with one active adapter.
    """

    def __init__(self, base: PreTrainedModel, folders: Sequence[Path]) -> None:
        self.names = [f"expert_{i}" for i in range(len(folders))]
        self.model = load_adapters(base, dict(zip(self.names, folders, strict=True))) if folders else None
        self.base = base
        self.lm_head: Any = base.get_output_embeddings() if head_selects_rows(base) else None

    def close(self) -> None:
        """Take the adapters off the base again."""
        if self.model is not None:
            self.model.unload()
            if hasattr(self.base, "peft_config"):
                del self.base.peft_config
            self.model = None

    def __enter__(self) -> Experts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def active(self, expert: int) -> Iterator[Any]:
        """The model with one adapter on, or none for `BASE`."""
        if expert == BASE or self.model is None:
            with self.model.disable_adapter() if self.model is not None else contextlib.nullcontext():
                yield self.model if self.model is not None else self.base
        else:
            self.model.set_adapter(self.names[expert])
            # set_adapter marks the adapter as trainable; inference keeps everything frozen.
            self.model.requires_grad_(False)
            yield self.model

    @torch.inference_mode()
    def losses(
        self, samples: Sequence[Sample], experts: np.ndarray, *, batch_size: int, pad_token_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean completion-token cross-entropy of each sample under its own adapter, in nats.

        `experts` is (n,), one adapter a sample. Returns losses (n,) float64 and supervised tokens (n,) int64.
        """
        losses, tokens = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
        with Progress("losses", len(samples), "sample") as progress:
            lengths = [len(s.input_ids) for s in samples]
            longest = max(lengths, default=0)
            for expert, rows in _batches(experts, lengths, batch_size):
                batch = pad_batch([samples[i] for i in rows], pad_token_id, longest=longest)
                logits, where = self.supervised_logits(expert, batch)
                losses[rows], tokens[rows] = mean_losses(logits, where), where.counts.cpu().numpy()
                progress.advance(len(rows))
        return losses, tokens

    def supervised_logits(self, expert: int, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Supervision]:
        """(n, V) float32 logits of one adapter at the n supervised positions of a batch, and which those are.

        Prompts are most of a batch, so lm_head is given the supervised positions only, where the model allows it.
        """
        where = Supervision.from_labels(batch["labels"], "sum").to(self.base.device)
        inputs = {name: batch[name].to(self.base.device) for name in ("input_ids", "attention_mask")}
        with self.active(expert) as model:
            if self.lm_head is None:
                return model(**inputs, use_cache=False).logits.flatten(0, 1)[where.rows].float(), where
            with of_rows(self.lm_head, where.rows):
                return model(**inputs, use_cache=False).logits.flatten(0, 1).float(), where

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        experts: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        **options: Any,
    ) -> list[str]:
        """Answers to token prompts, each from its own adapter. `options` go to transformers' `generate`."""
        answers = [""] * len(prompts)
        with Progress("answers", len(prompts), "prompt") as progress:
            for expert, rows in _batches(experts, [len(p) for p in prompts], batch_size):
                ids, mask = left_pad([prompts[i] for i in rows], padding_id(tokenizer))
                with self.active(expert) as model:
                    output = model.generate(
                        input_ids=ids.to(self.base.device),
                        attention_mask=mask.to(self.base.device),
                        pad_token_id=tokenizer.pad_token_id,
                        **options,
                    )
                texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
                for i, text in zip(rows, texts, strict=True):
                    answers[i] = text.strip()
                progress.advance(len(rows))
        return answers


class RoutedModel:
    """The product of a run: base, experts and router behind a few calls.

    `route` picks an expert, `generate` and `stream` answer with it, `generate_batch` answers many prompts, each with
    its own expert, in one pass a token. `shared`: the adapter that all experts started from, for a router whose
    fallback it is.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        experts: Sequence[Path],
        router: Router,
        template: Template,
        shared: Path | None = None,
    ) -> None:
        if router.n_clusters != len(experts):
            raise ModelError(f"the router knows {router.n_clusters} clusters but there are {len(experts)} experts")
        if router.fallback == "shared" and router.threshold is not None and shared is None:
            raise ModelError("the router falls back to the shared adapter, which this run does not have")
        self.tokenizer = tokenizer
        self.router = router
        self.template = template
        self.n_experts = len(experts)
        self.experts = StackedExperts(base, named_folders(experts, shared))

    @classmethod
    def from_run(cls, path: str | Path) -> RoutedModel:
        """Load a finished run. Raises `RunFolderError` where a stage is missing."""
        from gradientspace.run_folder import Run

        run = Run.open(path)
        router = Router.load(run.require("router", f"router {path}"))
        tokenizer = load_tokenizer(run.config.model)
        folders, shared = adapters_of(run)
        return cls(load_base(run.config.model), tokenizer, folders, router, template_of(run, tokenizer), shared)

    @property
    def names(self) -> list[str]:
        """What can answer: the experts, the shared adapter where there is one, and the base."""
        return [*self.experts.names, expert_name(BASE)]

    def route(self, prompt: Prompt) -> RouteDecision:
        """Which expert answers `prompt`, a string or messages with role and content."""
        return decide(self.router.predict_proba([prompt])[0], self.router.threshold, self.router.fallback)

    def request(self, prompt: Prompt, name: str, **options: Any) -> Request:
        """A row for `gradientspace.generation.generate`. `options`: fields of `Request`."""
        return Request(self.template.prompt_ids(prompt), self.row(name), **options)

    def row(self, name: str) -> int:
        """The number of `name` in the stacked experts, which hold the shared adapter last."""
        return BASE if name == expert_name(BASE) else self.experts.names.index(name)

    def number(self, name: str) -> int:
        """The inverse of `expert_name`."""
        return SHARED if name == expert_name(SHARED) else self.row(name)

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """The routed expert's answer, greedy by default. `options`: those of `generate_batch`."""
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[Prompt], *, expert: int | None = None, **options: Any) -> list[str]:
        """Every prompt answered by its own expert, all in one batch.

        `expert`: this one for all instead of the routed ones. `options`: `max_new_tokens`, `temperature`, `top_p`,
        `top_k`, `seed`, `stop`, see `gradientspace.generation.Request`. Raises `UnsureError` for a prompt that a
        router with fallback "error" cannot place.
        """
        answers = [""] * len(prompts)
        for piece in self._pieces(prompts, expert, options):
            answers[piece.row] += piece.text
        return [answer.strip() for answer in answers]

    def stream(self, prompt: Prompt, *, expert: int | None = None, **options: Any) -> Iterator[str]:
        """The answer in pieces, as they are made; `options` as for `generate_batch`."""
        return (piece.text for piece in self._pieces([prompt], expert, options) if piece.text)

    def _pieces(self, prompts: Sequence[Prompt], expert: int | None, options: dict[str, Any]) -> Iterator[Piece]:
        chosen = [self.route(prompt).answering() if expert is None else expert for prompt in prompts]
        pairs = zip(prompts, chosen, strict=True)
        requests = [self.request(prompt, expert_name(number), **options) for prompt, number in pairs]
        return generate(self.experts, requests, self.tokenizer, self.template.stop_ids)


def decide(probabilities: np.ndarray, threshold: float | None, fallback: Fallback = "base") -> RouteDecision:
    """One decision from one row of calibrated probabilities (K,); ties go to the lowest number."""
    order = np.argsort(-probabilities, kind="stable")
    best, probability = int(order[0]), float(probabilities[order[0]])
    unsure = threshold is not None and probability < threshold
    return RouteDecision(
        expert={"base": BASE, "shared": SHARED, "error": REFUSED}[fallback] if unsure else best,
        probability=probability,
        runner_up=int(order[1]) if len(order) > 1 else None,
        fallback=unsure,
    )


def expert_name(number: int) -> str:
    """What an expert is called in the server's model list, in an export and in PEFT."""
    return {BASE: "base", SHARED: "shared", REFUSED: "refused"}.get(number, f"expert_{number}")


def adapters_of(run: Run) -> tuple[list[Path], Path | None]:
    """The experts' folders in order, and the shared adapter's where the run has one.

    Raises `RunFolderError` where there are no experts, or one is damaged.
    """
    folders = expert_folders(run.path / "experts")
    if not folders:
        raise RunFolderError(f"{run.path} has no experts yet: run `gradientspace experts {run.path}` first")
    run.check("experts/", "shared")
    return folders, run.path / "shared" if run.has("shared") else None


def named_folders(experts: Sequence[Path], shared: Path | None) -> dict[str, Path]:
    """Name -> adapter folder, in the order of the model's numbers."""
    folders = {expert_name(k): folder for k, folder in enumerate(experts)}
    return folders if shared is None else folders | {expert_name(SHARED): shared}


def template_of(run: Run, tokenizer: PreTrainedTokenizerBase) -> Template:
    """How the run's prompts become tokens."""
    return Template(tokenizer, run.config.data.template, run.config.data.system_prompt)


def expert_folders(folder: Path) -> list[Path]:
    """`experts/0`, `experts/1`, … in the order of their numbers."""
    return sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def mean_losses(logits: torch.Tensor, where: Supervision) -> np.ndarray:
    """(b,) float64: each sample's mean cross-entropy over its supervised positions, from their logits (n, V)."""
    token_losses = torch.nn.functional.cross_entropy(logits, where.targets, reduction="none")
    return (where.per_sample(token_losses).double() / where.counts).cpu().numpy()


def _batches(experts: np.ndarray, lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Rows of one adapter and similar length together: yields (adapter, row numbers)."""
    for expert in np.unique(experts):
        rows = sorted(np.flatnonzero(experts == expert).tolist(), key=lambda i: lengths[i])
        for start in range(0, len(rows), batch_size):
            yield int(expert), rows[start : start + batch_size]
