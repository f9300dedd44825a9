"""A micro training that several test files share: base, tokenizer and a few samples, and one call that trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import micro_rows

from gradientspace.config import LoraConfig, ModelConfig, TrainingConfig
from gradientspace.data import Sample, Template
from gradientspace.models import load_base, load_tokenizer, lora, padding_id, save_adapter
from gradientspace.training import TrainingSummary, train_adapter

LORA = LoraConfig(lora_r=2, lora_alpha=4)
TRAINING = TrainingConfig(learning_rate=1e-2, per_device_train_batch_size=4, warmup_ratio=0.1)


class Micro:
    """Base, tokenizer and samples of the micro model."""

    def __init__(self, folder: Path, n: int = 24) -> None:
        config = ModelConfig(model_name_or_path=str(folder))
        self.folder = folder
        self.tokenizer = load_tokenizer(config)
        self.base = load_base(config)
        self.samples = self.make(n, seed=5)

    def make(self, n: int, seed: int) -> list[Sample]:
        template = Template(self.tokenizer)
        samples = []
        for i, row in enumerate(micro_rows(n, seed=seed)):
            prompt = template.prompt_ids(row["instruction"])
            answer = [*self.tokenizer(row["output"])["input_ids"], self.tokenizer.eos_token_id]
            samples.append(
                Sample(
                    id=row["id"], prompt=row["instruction"], input_ids=prompt + answer,
                    labels=[-100] * len(prompt) + answer, reference=row["output"], domain=None, source=None,
                    row=i + 1, messages=[],
                )
            )  # fmt: skip
        return samples

    def train(
        self,
        folder: Path,
        *,
        start: Path | None = None,
        epochs: float = 2.0,
        seed: int = 0,
        dropout: float = 0.0,
        options: dict[str, Any] | None = None,
        **more: Any,
    ) -> TrainingSummary:
        """Train on all samples and save the adapter in `folder`; `options` replace those of `TRAINING`."""
        with lora(self.base, replace(LORA, lora_dropout=dropout), start=start, seed=seed) as model:
            summary = train_adapter(
                model, self.samples, replace(TRAINING, **options or {}), epochs=epochs, seed=seed,
                pad_token_id=padding_id(self.tokenizer), label="t", **more,
            )  # fmt: skip
            save_adapter(model, folder)
        return summary


def weights(folder: Path) -> bytes:
    """The bytes of a saved adapter's weights."""
    return (folder / "adapter_model.safetensors").read_bytes()
