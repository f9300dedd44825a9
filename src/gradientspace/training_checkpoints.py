"""A Trainer that can be killed: its checkpoints are safetensors and JSON, and it goes on from them to the same bits.

transformers' own checkpoints hold optimiser, scheduler, random state and arguments as pickles; here a checkpoint is a
folder `checkpoint-STEP` with `state.safetensors` (adapter, optimiser moments, random state), `state.json` (schedule,
and what the training was made from), `trainer_state.json` (the Trainer's own) and their hashes. It appears complete or
not at all.

Checkpoints are taken by the clock, so that a short training writes none, and only at steps that are logged: the
Trainer's running loss is then zero, and nothing of it is lost. This module imports transformers; import it late.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from gradientspace.early_stopping import KeepBest
from gradientspace.files import is_sealed, seal
from gradientspace.progress import say

_PREFIX = "checkpoint-"
_TENSORS, _VALUES, _TRAINER = "state.safetensors", "state.json", "trainer_state.json"


class ResumableTrainer(Trainer):
    """`Trainer` whose checkpoints go to `output_dir`, at most one every `checkpoint_seconds`.

    `made_from` is any text that says what the training depends on beyond its arguments; `latest_checkpoint` only
    returns a checkpoint with the same one. `keep_best` is early stopping, whose state is part of a checkpoint.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *args: Any, checkpoint_seconds: float, made_from: str, keep_best: KeepBest | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.made_from = made_from
        self.keep_best = keep_best
        self.epoch_start = torch.get_rng_state()
        """Random state from which the current epoch's order of samples was drawn."""
        self.resumed_epoch_start: torch.Tensor | None = None
        self.add_callback(_Clock(checkpoint_seconds))
        self.add_callback(_EpochStart(self))

    # The methods below take the place of transformers' pickling ones, under the names that its loop calls.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{_PREFIX}{self.state.global_step}"
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        tensors, groups = _optimizer_state(self.optimizer)
        tensors |= {f"adapter.{name}": p.detach() for name, p in _trained(self.model).items()}
        at_epoch_end = float(self.state.epoch or 0).is_integer()
        tensors |= _random_state(torch.get_rng_state() if at_epoch_end else self.epoch_start)
        values = {"made_from": self.made_from, "param_groups": groups, "scheduler": self.lr_scheduler.state_dict()}
        if self.keep_best is not None:
            best_tensors, values["keep_best"] = self.keep_best.state()
            tensors |= {f"best.{name}": t for name, t in best_tensors.items()}
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial / _TENSORS)
        (partial / _VALUES).write_text(json.dumps(values))
        self.state.save_to_json(str(partial / _TRAINER))
        seal(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        for older in folder.parent.glob(f"{_PREFIX}*"):
            if older != folder:
                shutil.rmtree(older)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        tensors, values = _read(Path(resume_from_checkpoint))
        with torch.no_grad():
            for name, parameter in _trained(self.model).items():
                parameter.copy_(tensors[f"adapter.{name}"])
        if self.keep_best is not None:
            self.keep_best.load(_below(tensors, "best."), values["keep_best"])
        self.resumed_epoch_start = tensors["random.epoch_start"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors, values = _read(Path(checkpoint))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer.").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
        self.lr_scheduler.load_state_dict(values["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors, _ = _read(Path(checkpoint))
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])


class _Clock(TrainerCallback):
    """Asks for a checkpoint when the last one is `seconds` old and this step is logged."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = time.monotonic() - self.last >= self.seconds
        if due and control.should_log and state.global_step < state.max_steps:
            control.should_save = True
            self.last = time.monotonic()


class _EpochStart(TrainerCallback):
    """Draws a resumed epoch's order of samples anew from the random state that it was first drawn from."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.resumed_epoch_start is not None:
            torch.set_rng_state(self.trainer.resumed_epoch_start)
            self.trainer.resumed_epoch_start = None
        self.trainer.epoch_start = torch.get_rng_state()


def latest_checkpoint(folder: Path, made_from: str, label: str) -> Path | None:
    """The newest complete checkpoint below `folder` that was made from the same; says what it does."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    if not found:
        return None
    newest = max(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))
    if not is_sealed(newest):
        say(f"  {label}: its checkpoint is damaged (a hash differs); trained from the start")
        return None
    _, values = _read(newest)
    steps = json.loads((newest / _TRAINER).read_text())["global_step"]
    if values["made_from"] != made_from:
        say(f"  {label}: what its checkpoint was made from has changed; trained from the start")
        return None
    say(f"  {label}: continues after step {steps}")
    return newest


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / _TENSORS), json.loads((folder / _VALUES).read_text())


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_state(optimizer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors `optimizer.NUMBER.KEY` and the JSON-able parameter groups."""
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{number}.{key}": torch.as_tensor(value)
        for number, entry in state["state"].items()
        for key, value in entry.items()
    }
    return tensors, state["param_groups"]


def _random_state(epoch_start: torch.Tensor) -> dict[str, torch.Tensor]:
    """torch's generators: nothing else is drawn from while an adapter is trained."""
    states = {"random.cpu": torch.get_rng_state(), "random.epoch_start": epoch_start}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states
