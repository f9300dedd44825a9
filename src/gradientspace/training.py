"""Train one adapter on one set of samples: warm-up, shared adapter, experts and baselines alike.

The loop is transformers' `Trainer`; what is here chooses its arguments, pads batches and shows progress.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from gradientspace.config import TrainingConfig
from gradientspace.data import Sample, pad_batch
from gradientspace.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel


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
) -> TrainingSummary:
    """Minimise the mean completion-token cross-entropy of `samples`; changes the model's adapter in place.

    `epochs` may be a fraction. The learning rate rises and falls once over the phase, so every phase has the
    same schedule shape whatever its length.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rate = learning_rate if learning_rate is not None else config.learning_rate
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_ratio,  # a value below one is a share of the steps
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            activation_checkpointing=config.gradient_checkpointing,
            train_sampling_strategy="group_by_length",
            use_cpu=next(model.parameters()).device.type == "cpu",
            report_to=config.report_to,
            logging_steps=10,
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=False,
            seed=seed,
            data_seed=seed,
        )

        class Show(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.progress = Progress(label, state.max_steps, "step")

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.progress.advance()

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.progress.close()

        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Rows(samples),
            data_collator=lambda rows: pad_batch([row["sample"] for row in rows], pad_token_id),
            callbacks=[Show()],
        )
        trainer.remove_callback(PrinterCallback)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            trainer.train()
    history = trainer.state.log_history
    losses = [{"step": h["step"], "loss": round(h["loss"], 5)} for h in history if "loss" in h]
    model.eval()
    return TrainingSummary(
        samples=len(samples),
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        epochs=epochs,
        learning_rate=rate,
        losses=losses,
    )
