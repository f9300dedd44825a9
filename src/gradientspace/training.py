"""Train one adapter on one set of samples: warm-up, shared adapter, experts and baselines alike.

The loop is transformers' `Trainer`; what is here chooses its arguments, pads batches and shows progress.
`completion_loss.py` leaves out the prompt's logits, `training_checkpoints.py` lets it go on after a kill,
`early_stopping.py` ends it when a held-out part says so.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from gradientspace.config import TrainingConfig
from gradientspace.data import Sample, pad_batch
from gradientspace.errors import ConfigError
from gradientspace.progress import Progress, say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerCallback, TrainingArguments

    from gradientspace.early_stopping import KeepBest


@dataclass
class TrainingSummary:
    """What one training cost and how its loss went."""

    samples: int
    steps: int
    tokens: int
    """Non-padding tokens seen."""
    epochs: float
    learning_rate: float
    losses: list[dict[str, float]]
    """Logged `{"step", "loss"}`: mean token cross-entropy in nats since the last log."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """With early stopping: `{"step", "loss"}` on its held-out part."""
    best_step: int | None = None
    """With early stopping: the step whose adapter was kept."""
    sources: dict[str, int] = field(default_factory=dict)
    """How many of the samples come from which source."""
    domains: dict[str, int] = field(default_factory=dict)
    """How many carry which label, where they carry any; to judge by."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Rows(Dataset):
    """Samples as the mappings that the Trainer's length-grouped sampler wants."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {"input_ids": sample.input_ids, "sample": sample}


def train_adapter(
    model: PeftModel,
    samples: Sequence[Sample],
    config: TrainingConfig,
    *,
    epochs: float,
    seed: int,
    pad_token_id: int,
    label: str,
    learning_rate: float | None = None,
    held_out: Sequence[Sample] = (),
    checkpoints: Path | None = None,
    made_from: str = "",
    logs: Path | None = None,
    in_order: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingSummary:
    """Minimise the mean completion-token cross-entropy of `samples`; changes the model's adapter in place.

    `epochs` may be a fraction. The learning rate rises and falls once over the phase, so every phase has the
    same schedule shape whatever its length. `held_out` serves early stopping where the config asks for it.

    With a folder `checkpoints` the training leaves checkpoints there and goes on from the newest one that has the
    same `made_from`; the folder is removed at the end. A resumed training ends with the bits of an uninterrupted
    one on the CPU (the summary too).

    `logs` is where TensorBoard's files go, with `report_to` set to it; other trackers have a place of their own.
    `in_order` takes the samples as they come, in place of shuffled batches of similar length; `callbacks` are the
    Trainer's.
    """
    from transformers import PrinterCallback

    from gradientspace.completion_loss import CompletionTrainer
    from gradientspace.training_checkpoints import latest_checkpoint

    rate = learning_rate if learning_rate is not None else config.learning_rate
    keep_best = _early_stopping(config, held_out, label)
    phase = {
        "num_train_epochs": epochs,
        "learning_rate": rate,
        "seed": seed,
        "data_seed": seed,
        "run_name": label,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "report_to": config.report_to,
        "train_sampling_strategy": "sequential" if in_order else "group_by_length",
    }
    if keep_best:
        # An absolute number, since the checkpoints of a share are compared with it and found to differ.
        steps = config.eval_steps * (optimiser_steps(len(samples), config, epochs) if config.eval_steps < 1 else 1)
        phase |= {"eval_strategy": "steps", "eval_steps": math.ceil(steps)}
    if config.report_to == "tensorboard" and logs:
        phase["report_to"] = "none"
        callbacks = [*callbacks, _tensorboard(logs)]
    with _folder(checkpoints) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # users can do nothing about it
        longest = max(len(sample.input_ids) for sample in [*samples, *held_out])
        trainer = CompletionTrainer(
            model=model,
            args=_arguments(config, output_dir=str(folder), **phase),
            train_dataset=_Rows(samples),
            eval_dataset=_Rows(held_out) if keep_best else None,
            data_collator=lambda rows: pad_batch([row["sample"] for row in rows], pad_token_id, longest=longest),
            callbacks=[_show_progress(label), *([keep_best] if keep_best else []), *callbacks],
            checkpoint_seconds=config.checkpoint_seconds if checkpoints else math.inf,
            made_from=made_from,
            keep_best=keep_best,
        )
        trainer.remove_callback(PrinterCallback)
        resume = latest_checkpoint(folder, made_from, label) if checkpoints else None
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if config.report_to == "wandb":
        # transformers leaves it open, and the next phase would go on in the same curve.
        importlib.import_module("wandb").finish()
    model.eval()
    return TrainingSummary(
        samples=len(samples),
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        epochs=epochs,
        learning_rate=rate,
        losses=[{"step": h["step"], "loss": round(h["loss"], 5)} for h in trainer.state.log_history if "loss" in h],
        evaluations=keep_best.evaluations if keep_best else [],
        best_step=keep_best.best_step if keep_best else None,
        sources=_counted(s.source for s in samples),
        domains=_counted(s.domain for s in samples),
    )


def _early_stopping(config: TrainingConfig, held_out: Sequence[Sample], label: str) -> KeepBest | None:
    from gradientspace.early_stopping import KeepBest

    if config.early_stopping_patience is None:
        return None
    if not held_out:
        say(f"  {label}: no held-out sample, so no early stopping")
        return None
    return KeepBest(config.early_stopping_patience)


def _counted(labels: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(label for label in labels if label is not None).items()))


def optimiser_steps(samples: int, config: TrainingConfig, epochs: float) -> int:
    """Steps of a training, as the Trainer counts them: the last batch and the last accumulation may be short."""
    batches = math.ceil(samples / config.per_device_train_batch_size)
    return math.ceil(epochs * math.ceil(batches / config.gradient_accumulation_steps))


def _arguments(config: TrainingConfig, **phase: Any) -> TrainingArguments:
    """The Trainer's arguments: those of every phase from the config, `phase` on top."""
    from transformers import TrainingArguments

    try:
        return TrainingArguments(
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_ratio,  # a value below one is a share of the steps
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            activation_checkpointing=config.gradient_checkpointing,
            logging_steps=10,
            save_strategy="no",  # ResumableTrainer saves by the clock
            prediction_loss_only=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=False,
            **phase,
        )
    except ValueError as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error


def _tensorboard(folder: Path) -> TrainerCallback:
    """transformers would write below its output folder, which does not outlive the training."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def _show_progress(label: str) -> Any:
    from transformers import TrainerCallback

    class Show(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.progress = Progress(label, state.max_steps - state.global_step, "step")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.progress.advance()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.progress.close()

    return Show()


@contextlib.contextmanager
def _folder(checkpoints: Path | None) -> Iterator[Path]:
    """Where the Trainer may write: `checkpoints`, gone once the training is complete, else a folder for scratch."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        yield checkpoints
        shutil.rmtree(checkpoints, ignore_errors=True)
