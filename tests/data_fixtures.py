"""Small tokenizers, chat templates and files for the tests of the data room."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gradientspace.config import DataConfig, SourceConfig

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = (
    *SPECIAL,
    *(" ", "\n", "\n\n", "###", "Instruction:", "Response:", "system", "user", "assistant"),
    *(
        "Add",
        "2",
        "3",
        "5",
        "Paris",
        "capital",
        "France",
        "hello",
        "good",
        "day",
        "again",
        "bye",
        "Be",
        "brief",
    ),
    "<unk>",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (  # a begin token, no system role, strict alternation, trimmed content, as early Mistral
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
UNCLOSED = (  # nothing closes an assistant turn
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # the last answer gets an empty thought that earlier ones do not, as Qwen3
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FINAL_EOS = CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"  # as Phi-3
REWRITING = (  # the generation prompt is no prefix of what it is followed by, as DeepSeek-R1's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def word_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Every word, space and line break is one token, so that expectations can be written by hand."""
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n| |[^\s]+"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend, chat_template)


@cache
def _byte_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = [
        "hello there, the answer is\n\n",
        "\n\n\n",
        "a  b   c",
        "def f(x):\n    return x\n\n",
        "ab </ba\n\n\n",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text * 20, trainer)
    return backend.to_str()


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges of spaces and line breaks, as real ones have: any text survives it."""
    return _wrap(Tokenizer.from_str(_byte_backend()), chat_template)


def _wrap(backend: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def ids_of(tokens: list[str]) -> list[int]:
    return [WORDS.index(token) for token in tokens]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca_rows(n: int, **columns: Any) -> list[dict[str, Any]]:
    """`n` rows whose prompts share few words."""
    return [
        {"id": f"r{i:04d}", "instruction": f"q{i} w{i * 7} v{i * 13}", "output": f"answer {i}", **columns}
        for i in range(n)
    ]


def config_of(*paths: Path | str, **options: Any) -> DataConfig:
    """Train sources without test ones, losses allowed."""
    options.setdefault("max_loss_fraction", 1.0)
    return DataConfig(train=[SourceConfig(path=str(path)) for path in paths], **options)
