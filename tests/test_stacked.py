"""Stacked experts against plain PEFT with one adapter, on every kind of model that the gradient engine knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_gradients import VOCAB, randomise
from test_gradients_models import MODELS

from gradientspace.errors import ModelError
from gradientspace.generation import left_pad
from gradientspace.models import load_adapters
from gradientspace.stacked import BASE, StackedExperts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TARGETS = {"mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def save_experts(name: str, folder: Path, n: int = 3, **options) -> dict[str, Path]:
    """`n` adapters of different weights for the architecture `name`, as PEFT saves them."""
    folders = {}
    for k in range(n):
        config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS.get(name, "all-linear")} | options
        model = get_peft_model(
            base_of(name), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **config)
        )
        randomise(model, seed=k + 1)
        folders[f"e{k}"] = folder / f"e{k}"
        model.save_pretrained(str(folders[f"e{k}"]))
    return folders


def base_of(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def plain_logits(name: str, folders: dict[str, Path], expert: int, prompt: list[int]) -> torch.Tensor:
    base = base_of(name)
    model = base if expert == BASE else PeftModel.from_pretrained(base, str(list(folders.values())[expert])).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_equals_plain_peft_row_by_row(name, tmp_path):
    folders = save_experts(name, tmp_path)
    rows, texts = [2, BASE, 0, 0, 1], prompts(12, 12, 12, 12, 12)
    with StackedExperts(base_of(name), folders) as experts, torch.inference_mode():
        with experts.batch(rows) as model:
            whole = model(input_ids=torch.tensor(texts)).logits
            first = model(input_ids=torch.tensor(texts)[:, :1]).logits
        with experts.batch([BASE] * 5) as model:
            base = model(input_ids=torch.tensor(texts)).logits
    for i, (expert, text) in enumerate(zip(rows, texts, strict=True)):
        expected = plain_logits(name, folders, expert, text)
        torch.testing.assert_close(whole[i], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(first[i, 0], expected[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(base[i], plain_logits(name, folders, BASE, text), atol=1e-4, rtol=0)
    assert (whole[2] - base[2]).abs().max() > 1e-2


def test_ranks_targets_and_scalings_may_differ_between_experts(tmp_path):
    folders = {
        **save_experts("llama", tmp_path / "a", n=1, r=2, target_modules=["q_proj", "down_proj"]),
        "wide": save_experts("llama", tmp_path / "b", n=1, r=6, use_rslora=True, alpha_pattern={"v_proj": 3})["e0"],
    }
    text = prompts(9)[0]
    with StackedExperts(base_of("llama"), folders) as experts, torch.inference_mode(), experts.batch([0, 1]) as model:
        mixed = model(input_ids=torch.tensor([text, text])).logits
    for expert in (0, 1):
        torch.testing.assert_close(mixed[expert], plain_logits("llama", folders, expert, text), atol=1e-4, rtol=0)


def test_rows_may_leave_a_running_batch(tmp_path):
    folders = save_experts("llama", tmp_path)
    texts = torch.tensor(prompts(7, 7, 7))
    with (
        StackedExperts(base_of("llama"), folders) as experts,
        torch.inference_mode(),
        experts.batch([2, 0, 1]) as model,
    ):
        before = model(input_ids=texts).logits
        experts.select([0, 1])
        after = model(input_ids=texts[1:]).logits
        with pytest.raises(ModelError, match="expert 3 does not exist"):
            experts.select([3])
    torch.testing.assert_close(after, before[1:], atol=1e-5, rtol=0)


def test_closing_gives_the_base_back(tmp_path):
    base = base_of("llama")
    keys = list(base.state_dict())
    StackedExperts(base, save_experts("llama", tmp_path)).close()
    assert list(base.state_dict()) == keys
    load_adapters(base, {"again": tmp_path / "e0"})  # PEFT does not warn of a second adapter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"layer model\.layers\.0\.self_attn\.q_proj is a LoRA variant \(DoraLinearVariant\)"),
        ({"lora_bias": True}, r"layer model\.layers\.0\.self_attn\.q_proj has lora_bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"layer model\.embed_tokens is a Embedding of PEFT"),
        ({"modules_to_save": ["lm_head"]}, r"adapter e0 has modules_to_save=\['lm_head'\]"),
        ({"bias": "lora_only"}, r"adapter e0 trains biases of the base"),
        ({"trainable_token_indices": [1, 2]}, r"adapter e0 has trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:Setting .save_embedding_layers.")
def test_what_cannot_be_stacked_is_refused_by_name(options, message, tmp_path):
    name = "phi" if "lora_bias" in options else "llama"
    folders = save_experts(name, tmp_path, n=1, **options)
    base = base_of(name)
    with pytest.raises(ModelError, match=message):
        StackedExperts(base, folders)
    assert not hasattr(base, "peft_config")


def test_layers_that_lose_their_rows_are_refused_by_name(tmp_path):
    from test_gradients_models import UnfusedExperts

    def unfused():
        model = base_of("llama")
        torch.manual_seed(1)
        model.model.layers[1].mlp = UnfusedExperts(model.config)
        return model.eval()

    peft_model = get_peft_model(unfused(), LoraConfig(target_modules=["up_proj"]))
    randomise(peft_model)
    peft_model.save_pretrained(str(tmp_path))
    with (
        StackedExperts(unfused(), {"e0": tmp_path}) as experts,
        experts.batch([0, BASE]) as model,
        pytest.raises(ModelError, match=r"layer model\.layers\.1\.mlp\.experts\.\d\.up_proj gets tokens without"),
    ):
        model(input_ids=torch.tensor(prompts(6, 6)))


def test_a_non_finite_expert_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folders = save_experts("llama", tmp_path, n=2)
    path = folders["e1"] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"layer model\.layers\.0\.self_attn\.q_proj has a non-finite LoRA weight"):
        StackedExperts(base_of("llama"), folders)


def test_padding_changes_nothing(tmp_path):
    folders = save_experts("llama", tmp_path)
    texts = prompts(3, 11)
    ids, mask = left_pad(texts, 0)
    with StackedExperts(base_of("llama"), folders) as experts, torch.inference_mode(), experts.batch([1, 2]) as model:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for i, (expert, text) in enumerate([(1, texts[0]), (2, texts[1])]):
        expected = plain_logits("llama", folders, expert, text)
        torch.testing.assert_close(logits[i, -len(text) :], expected, atol=1e-4, rtol=0)
