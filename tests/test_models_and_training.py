"""Adapters come and go without a trace on the base; training is Trainer's, and repeats to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import micro_rows
from safetensors.torch import load_file

from gradientspace.config import LoraConfig, ModelConfig, TrainingConfig
from gradientspace.data import Sample, Template, pad_batch
from gradientspace.errors import ModelError
from gradientspace.models import load_adapters, load_base, load_tokenizer, lora, padding_id, save_adapter
from gradientspace.training import train_adapter

LORA = LoraConfig(lora_r=2, lora_alpha=4)
TRAINING = TrainingConfig(learning_rate=1e-2, per_device_train_batch_size=4, warmup_ratio=0.1)


@pytest.fixture(scope="module")
def micro(micro_model: Path):
    config = ModelConfig(model_name_or_path=str(micro_model))
    tokenizer = load_tokenizer(config)
    template = Template(tokenizer)
    samples = []
    for i, row in enumerate(micro_rows(24, seed=5)):
        prompt = template.prompt_ids(row["instruction"])
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        samples.append(
            Sample(
                id=row["id"], prompt=row["instruction"], input_ids=prompt + answer,
                labels=[-100] * len(prompt) + answer, reference=row["output"], domain=None, source=None, row=i + 1,
                messages=[],
            )
        )  # fmt: skip
    return load_base(config), tokenizer, samples


def train(micro, folder: Path, *, start: Path | None = None, epochs: float = 2.0, seed: int = 0):
    base, tokenizer, samples = micro
    with lora(base, LORA, start=start, seed=seed) as model:
        summary = train_adapter(
            model, samples, TRAINING, epochs=epochs, seed=seed, pad_token_id=padding_id(tokenizer), label="t"
        )
        save_adapter(model, folder)
    return summary


def test_an_adapter_leaves_no_trace_on_the_base(micro, tmp_path: Path) -> None:
    base = micro[0]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    train(micro, tmp_path / "a")
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in base.parameters())


def test_training_repeats_to_the_bit_and_depends_on_the_seed(micro, tmp_path: Path) -> None:
    one, two, other = (train(micro, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one == two
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert read[0] == read[1] != read[2]
    assert other.losses != one.losses
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in "ab"]
    assert configs[0] == configs[1]


def test_summary_counts_tokens_and_steps(micro, tmp_path: Path) -> None:
    summary = train(micro, tmp_path / "a", epochs=2)
    assert summary.tokens == 2 * sum(len(s.input_ids) for s in micro[2])
    assert summary.steps == 12
    assert train(micro, tmp_path / "b", epochs=0.5).steps == 3


def test_training_lowers_the_loss_and_goes_on_from_a_start(micro, tmp_path: Path) -> None:
    base, _, samples = micro

    def loss(folder: Path | None) -> float:
        with lora(base, LORA, start=folder, seed=0) as model, torch.inference_mode():
            return float(model(**pad_batch(samples, 0)).loss)

    train(micro, tmp_path / "a", epochs=4)
    train(micro, tmp_path / "b", start=tmp_path / "a", epochs=4)
    assert loss(None) > loss(tmp_path / "a") > loss(tmp_path / "b")


def test_a_fresh_adapter_changes_nothing_yet(micro) -> None:
    base, _, samples = micro
    batch = pad_batch(samples[:2], 0)
    with torch.inference_mode():
        expected = base(**batch).logits
        with lora(base, LORA, start=None, seed=0) as model:
            torch.testing.assert_close(model(**batch).logits, expected)


def test_saved_adapters_are_plain_peft_folders(micro, tmp_path: Path) -> None:
    train(micro, tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 2, sorted(config["target_modules"]))
    assert all(".lora_" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))


def test_model_errors_are_one_line(micro, tmp_path: Path) -> None:
    cases = [
        lambda: load_base(ModelConfig(model_name_or_path="./nowhere")),
        lambda: load_tokenizer(ModelConfig(model_name_or_path="nobody/no-such-model")),
        lambda: load_base(ModelConfig(model_name_or_path=str(tmp_path))),
        lambda: load_adapters(micro[0], {"a": tmp_path / "no-adapter"}),
        lambda: lora(micro[0], LoraConfig(target_modules=["nope"]), start=None, seed=0).__enter__(),
    ]
    for case in cases:
        with pytest.raises(ModelError) as caught:
            case()
        assert "\n" not in str(caught.value)
