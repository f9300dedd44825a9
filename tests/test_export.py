"""Exports: engines get folders that are complete, exact and equal to the experts; what they cannot serve is refused."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from data_fixtures import BRACKETS, CHATML, byte_tokenizer
from safetensors.torch import load_file, save_file

from gradientspace.config import GradientSpaceConfig, ModelConfig
from gradientspace.data import Template
from gradientspace.errors import ConfigError, ModelError
from gradientspace.export import ENGINES, check_adapter, check_base, check_before_training, copy_adapter, export
from gradientspace.models import public_id, save_tokenizer
from gradientspace.run_folder import Run


@pytest.mark.e2e
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gets_a_complete_folder(finished_run: Run, tmp_path: Path, engine: str) -> None:
    folder = export(finished_run, engine, tmp_path / engine)
    assert {p.name for p in (folder / "adapters").iterdir()} == {"expert_0", "expert_1", "shared"}
    assert (folder / "README.md").read_text().startswith("# Experts")
    assert not list(tmp_path.glob("*.partial"))
    for script in folder.glob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)
        assert script.stat().st_mode & 0o100
    export(finished_run, engine, tmp_path / engine)  # again, over the old one


@pytest.mark.e2e
def test_vllm_gets_one_slot_more_than_adapters(finished_run: Run, tmp_path: Path) -> None:
    words = launch_words(export(finished_run, "vllm", tmp_path / "v"), "vllm.entrypoints.openai.api_server")
    assert words[words.index("--max-loras") + 1] == "4"
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    at = words.index("--lora-modules")
    served = words[at + 1 : at + 4]
    assert served == ["expert_0=adapters/expert_0", "expert_1=adapters/expert_1", "shared=adapters/shared"]


@pytest.mark.e2e
def test_sglang_counts_the_base_as_an_adapter(finished_run: Run, tmp_path: Path) -> None:
    words = launch_words(export(finished_run, "sglang", tmp_path / "s"), "sglang.launch_server")
    assert words[words.index("--max-loras-per-batch") + 1] == "4"
    assert "--upstream-name 'base:{name}'" in (tmp_path / "s/README.md").read_text()
    at = words.index("--lora-target-modules")
    assert words[at + 1 : at + 8] == sorted(words[at + 1 : at + 8])
    assert "q_proj" in words[at:]


@pytest.mark.e2e
def test_ollama_and_litellm_files(finished_run: Run, tmp_path: Path) -> None:
    folder = export(finished_run, "ollama", tmp_path / "o")
    text = (folder / "Modelfile.expert_1").read_text()
    assert text.startswith(f"FROM {finished_run.config.model.model_name_or_path}\nADAPTER ./adapters/expert_1\n")
    assert "### Instruction:\n{{ .Prompt }}\n\n### Response:\n" in text
    assert 'PARAMETER stop "</s>"' in text
    folder = export(finished_run, "litellm", tmp_path / "l")
    models = yaml.safe_load((folder / "config.yaml").read_text())["model_list"]
    assert [m["litellm_params"]["model"] for m in models] == [
        "openai/auto", "openai/base", "openai/expert_0", "openai/expert_1", "openai/shared",
    ]  # fmt: skip


def launch_words(folder: Path, module: str) -> list[str]:
    """The words of the launch line, as a shell splits them."""
    text = (folder / "serve.sh").read_text().replace("\\\n", " ")
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("exec ")))[1:]
    assert words[1:3] == ["-m", module]
    return words


@pytest.mark.e2e
def test_a_padded_adapter_computes_the_same(finished_run: Run, tmp_path: Path) -> None:
    """Rank 2 becomes rank 8, which engines serve; PEFT gives the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 40, 41, 42, 43]])
    source = finished_run.path / "experts/1"
    copy_adapter(source, tmp_path / "padded", 8)
    assert json.loads((tmp_path / "padded/adapter_config.json").read_text())["r"] == 8
    logits = []
    for folder in (source, tmp_path / "padded"):
        base = AutoModelForCausalLM.from_pretrained(finished_run.config.model.model_name_or_path)
        with torch.inference_mode():
            logits.append(PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits)
            plain = base.get_base_model()(input_ids=ids).logits if hasattr(base, "get_base_model") else None
    assert plain is None or not torch.equal(plain, logits[0])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(8, 4)}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 128}, "its rank is 128, above 64"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5]}, "tokens of its own"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "only LoRA adapters"),
    ],
)
def test_what_an_engine_cannot_serve_is_one_line(adapter: Path, changes: dict, reason: str) -> None:
    path = adapter / "adapter_config.json"
    check_adapter(adapter, "vllm")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=reason):
        check_adapter(adapter, "vllm")


def test_weights_of_the_embedding_are_refused(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="embedding or the head"):
        check_adapter(adapter, "sglang")


def test_an_engine_that_is_asked_for_refuses_before_training(micro_model: Path) -> None:
    values = {
        "model": {"model_name_or_path": str(micro_model)},
        "data": {"train": [{"path": "x.jsonl"}]},
        "lora": {"lora_r": 128},
        "export": {"engine": "vllm"},
    }
    with pytest.raises(ConfigError, match="lora_r is 128, which vllm cannot serve"):
        GradientSpaceConfig.from_dict(values).validate()
    values["lora"]["lora_r"] = 16
    GradientSpaceConfig.from_dict(values).validate()
    model = ModelConfig(model_name_or_path=str(micro_model))
    check_before_training("ollama", model, "all-linear")
    with pytest.raises(ModelError, match="target_modules has lm_head, which vllm cannot serve"):
        check_before_training("vllm", model, ["q_proj", "lm_head"])

    class Phi:
        architectures = ("PhiForCausalLM",)

    check_base(Phi(), "vllm")
    with pytest.raises(ModelError, match="ollama converts no adapters of PhiForCausalLM"):
        check_base(Phi(), "ollama")


def test_a_public_id_is_found_where_there_is_one(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--org--some-model/snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    assert public_id(ModelConfig(model_name_or_path="org/name", revision="v1")) == ("org/name", "v1")
    assert public_id(ModelConfig(model_name_or_path=str(snapshot))) == ("org/some-model", "0123abcd")
    assert public_id(ModelConfig(model_name_or_path=str(tmp_path))) is None
    assert public_id(ModelConfig(model_name_or_path=str(tmp_path), hub_id="org/name")) == ("org/name", None)


@pytest.mark.e2e
def test_experts_carry_the_tokenizer_and_the_template_of_the_training(finished_run: Run) -> None:
    from transformers import AutoTokenizer

    for name in ("experts/0", "experts/1", "shared", "single"):
        tokenizer = AutoTokenizer.from_pretrained(finished_run.path / name)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "### Instruction:\nhi\n\n### Response:\n"
    assert not (finished_run.path / "baselines/random/experts/0/tokenizer.json").exists()


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("chat", [None, CHATML, BRACKETS], ids=["plain", "chatml", "folding"])
@pytest.mark.parametrize("own_system", [False, True])
def test_the_saved_template_renders_the_prompts_of_the_training(tmp_path, chat, system, own_system) -> None:
    from transformers import AutoTokenizer

    template = Template(byte_tokenizer(chat), system_prompt=system)
    save_tokenizer(template.tokenizer, tmp_path, template.jinja)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Rhyme."}] if own_system else []
    messages += [
        {"role": "user", "content": "a\n b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d\n"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == template.prompt_ids(messages)
    assert template.tokenizer.chat_template == chat, "the tokenizer in use is left as it is"
