"""Route once, activate one expert, run one forward pass a token. No gradient and no ensemble at inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradientspace.data import Sample, Template, pad_batch
from gradientspace.errors import ModelError, RunFolderError
from gradientspace.models import load_adapters, load_base, load_tokenizer, padding_id
from gradientspace.progress import Progress
from gradientspace.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = -1
"""In place of an expert's number: the base model, all adapters off."""


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Which expert answers a prompt, how sure the router is, and what came second."""

    expert: int
    """Number of the chosen expert, or -1 for the base."""
    probability: float
    """Calibrated probability of the chosen expert."""
    runner_up: int | None
    """The second most probable expert; `None` with one expert."""
    fallback: bool
    """True where the probability was under the router's threshold and the base answers instead."""


class Experts:
    """A base with several adapters: losses and answers of a batch in which every row names its adapter.

    Rows are grouped by adapter, and each group runs as ordinary PEFT inference with one active adapter.
    """

    def __init__(self, base: PreTrainedModel, folders: Sequence[Path]) -> None:
        self.names = [f"expert_{i}" for i in range(len(folders))]
        self.model = load_adapters(base, dict(zip(self.names, folders, strict=True))) if folders else None
        self.base = base

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
            for expert, rows in _batches(experts, [len(s.input_ids) for s in samples], batch_size):
                batch = pad_batch([samples[i] for i in rows], pad_token_id)
                with self.active(expert) as model:
                    sums, counts = _completion_loss(model, batch)
                losses[rows], tokens[rows] = (sums / counts).numpy(), counts.numpy()
                progress.advance(len(rows))
        return losses, tokens

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
                ids, mask = _left_pad([prompts[i] for i in rows], padding_id(tokenizer))
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
    """The product of a run: base, experts and router behind two calls, `route` and `generate`."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        experts: Sequence[Path],
        router: Router,
        template: Template,
    ) -> None:
        if router.n_clusters != len(experts):
            raise ModelError(f"the router knows {router.n_clusters} clusters but there are {len(experts)} experts")
        self.tokenizer = tokenizer
        self.experts = Experts(base, experts)
        self.router = router
        self.template = template

    @classmethod
    def from_run(cls, path: str | Path) -> RoutedModel:
        """Load a finished run. Raises `RunFolderError` where a stage is missing."""
        from gradientspace.run_folder import Run

        run = Run.open(path)
        router = Router.load(run.require("router", f"router {path}"))
        folders = expert_folders(run.path / "experts")
        if not folders:
            raise RunFolderError(f"{path} has no experts yet: run `gradientspace experts {path}` first")
        tokenizer, data = load_tokenizer(run.config.model), run.config.data
        template = Template(tokenizer, data.template, data.system_prompt)
        return cls(load_base(run.config.model), tokenizer, folders, router, template)

    def route(self, prompt: str | Sequence[Mapping[str, Any]]) -> RouteDecision:
        """Which expert answers `prompt`, a string or messages with role and content."""
        return decide(self.router.predict_proba([prompt])[0], self.router.threshold)

    def generate(
        self,
        prompt_or_messages: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> str:
        """The routed expert's answer. `options` go to transformers' `generate`; greedy unless they say otherwise."""
        decision = self.route(prompt_or_messages)
        ids = self.template.prompt_ids(prompt_or_messages)
        stops = self.template.stop_ids
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": stops, **options}
        return self.experts.generate([ids], np.array([decision.expert]), self.tokenizer, batch_size=1, **options)[0]


def decide(probabilities: np.ndarray, threshold: float | None) -> RouteDecision:
    """One decision from one row of calibrated probabilities (K,); ties go to the lowest number."""
    order = np.argsort(-probabilities, kind="stable")
    best = int(order[0])
    fallback = threshold is not None and float(probabilities[best]) < threshold
    return RouteDecision(
        expert=BASE if fallback else best,
        probability=float(probabilities[best]),
        runner_up=int(order[1]) if len(order) > 1 else None,
        fallback=fallback,
    )


def expert_folders(folder: Path) -> list[Path]:
    """`experts/0`, `experts/1`, … in the order of their numbers."""
    return sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def _batches(experts: np.ndarray, lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Rows of one adapter and similar length together: yields (adapter, row numbers)."""
    for expert in np.unique(experts):
        rows = sorted(np.flatnonzero(experts == expert).tolist(), key=lambda i: lengths[i])
        for start in range(0, len(rows), batch_size):
            yield int(expert), rows[start : start + batch_size]


def _completion_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (b,) and number of supervised tokens (b,), in float32, on the CPU."""
    device = next(model.parameters()).device
    labels = batch["labels"][:, 1:].to(device)
    logits = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        use_cache=False,
    ).logits[:, :-1]
    supervised = labels != -100
    # Only supervised positions are turned to float32 and normalised: prompts are most of a batch.
    token_losses = torch.nn.functional.cross_entropy(logits[supervised].float(), labels[supervised], reduction="none")
    sums = torch.zeros(labels.shape[0], device=device).index_add_(0, supervised.nonzero()[:, 0], token_losses)
    return sums.double().cpu(), supervised.sum(dim=1).cpu()


def _left_pad(prompts: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
