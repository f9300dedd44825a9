"""Adapters come and go without a trace on the base; training is Trainer's, and repeats to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from micro_training import LORA, Micro, weights
from safetensors.torch import load_file

from gradientspace import models
from gradientspace.config import LoraConfig, ModelConfig
from gradientspace.data import pad_batch
from gradientspace.errors import ConfigError, ModelError
from gradientspace.models import load_adapters, load_base, load_tokenizer, lora, save_adapter


@pytest.fixture(scope="module")
def micro(micro_model: Path) -> Micro:
    return Micro(micro_model)


def test_an_adapter_leaves_no_trace_on_the_base(micro, tmp_path: Path) -> None:
    base = micro.base
    before = {name: value.clone() for name, value in base.state_dict().items()}
    micro.train(tmp_path / "a")
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in base.parameters())


def test_training_repeats_to_the_bit_and_depends_on_the_seed(micro, tmp_path: Path) -> None:
    one, two, other = (micro.train(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one == two
    read = [weights(tmp_path / name) for name in "abc"]
    assert read[0] == read[1] != read[2]
    assert other.losses != one.losses
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in "ab"]
    assert configs[0] == configs[1]


def test_summary_counts_tokens_and_steps(micro, tmp_path: Path) -> None:
    summary = micro.train(tmp_path / "a", epochs=2)
    assert summary.tokens == 2 * sum(len(s.input_ids) for s in micro.samples)
    assert summary.steps == 12
    assert micro.train(tmp_path / "b", epochs=0.5).steps == 3


def test_training_lowers_the_loss_and_goes_on_from_a_start(micro, tmp_path: Path) -> None:
    base, samples = micro.base, micro.samples

    def loss(folder: Path | None) -> float:
        with lora(base, LORA, start=folder, seed=0) as model, torch.inference_mode():
            return float(model(**pad_batch(samples, 0)).loss)

    micro.train(tmp_path / "a", epochs=4)
    micro.train(tmp_path / "b", start=tmp_path / "a", epochs=4)
    assert loss(None) > loss(tmp_path / "a") > loss(tmp_path / "b")


def test_a_fresh_adapter_changes_nothing_yet(micro) -> None:
    base, samples = micro.base, micro.samples
    batch = pad_batch(samples[:2], 0)
    with torch.inference_mode():
        expected = base(**batch).logits
        with lora(base, LORA, start=None, seed=0) as model:
            torch.testing.assert_close(model(**batch).logits, expected)


def test_saved_adapters_are_plain_peft_folders(micro, tmp_path: Path) -> None:
    micro.train(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 2, sorted(config["target_modules"]))
    assert all(".lora_" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))


def test_model_errors_are_one_line(micro, tmp_path: Path) -> None:
    cases = [
        lambda: load_base(ModelConfig(model_name_or_path="./nowhere")),
        lambda: load_tokenizer(ModelConfig(model_name_or_path="nobody/no-such-model")),
        lambda: load_base(ModelConfig(model_name_or_path=str(tmp_path))),
        lambda: load_adapters(micro.base, {"a": tmp_path / "no-adapter"}),
        lambda: lora(micro.base, LoraConfig(target_modules=["nope"]), start=None, seed=0).__enter__(),
    ]
    for case in cases:
        with pytest.raises(ModelError) as caught:
            case()
        assert "\n" not in str(caught.value)


def test_the_trainer_refuses_a_wrong_option_in_one_line(micro, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training: .*nope"):
        micro.train(tmp_path / "a", options={"lr_scheduler_type": "nope"})


def test_tensorboard_files_outlive_the_training(micro, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracker is not installed")
    micro.train(tmp_path / "a", options={"report_to": "tensorboard"}, logs=tmp_path / "logs", epochs=2)
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


def test_activation_checkpointing_and_accumulation_change_no_result(micro, tmp_path: Path) -> None:
    micro.train(tmp_path / "plain")
    micro.train(tmp_path / "recomputed", options={"gradient_checkpointing": True})
    assert weights(tmp_path / "plain") == weights(tmp_path / "recomputed")
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    micro.train(tmp_path / "parts", options=parts)
    whole, summed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(summed[name], tensor, atol=2e-3, rtol=0.05)


def test_an_adapter_names_the_public_id_of_its_base(micro, tmp_path: Path) -> None:
    public = ModelConfig(model_name_or_path=str(micro.folder), hub_id="org/name", revision="v2")
    for base, expected in ((None, (str(micro.folder), None)), (public, ("org/name", "v2"))):
        with lora(micro.base, LORA, start=None, seed=0) as model:
            save_adapter(model, tmp_path / "a", base)
        config = json.loads((tmp_path / "a/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == expected


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("option", "layer"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
def test_an_adapter_trains_on_a_quantised_base(micro, tmp_path: Path, monkeypatch, option: str, layer: str) -> None:
    """With bitsandbytes' CPU kernels; we ask users for a CUDA device, where it is fast."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options_of = models._quantised

    def on_the_cpu(config: ModelConfig, device: torch.device) -> dict:
        return options_of(config, torch.device("cuda")) | {"device_map": {"": "cpu"}}

    monkeypatch.setattr(models, "_quantised", on_the_cpu)
    base = load_base(ModelConfig(model_name_or_path=str(micro.folder), device="cpu", **{option: True}))
    assert type(base.get_submodule("model.layers.0.mlp.up_proj")).__name__ == layer
    monkeypatch.setattr(micro, "base", base)
    losses = micro.train(tmp_path / "a", epochs=10).losses
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.1
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values())
