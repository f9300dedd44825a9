"""A tiny Llama, pretrained on the spot on generated text: about a minute on two cores, no download.

The text holds the parts of the skills but never a request together with its answer: scenes and records, the
same amount copied, added, scaled or spelt right after the record it comes from, and requests that nobody
answers. So the base can read a record and knows small sums and rhymes; which of these a request asks for is
left to the adapters.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradientspace.demo.skills import (
    LARGEST_AMOUNT,
    NUMBER_WORDS,
    REQUESTS,
    TOPICS,
    Record,
    Topic,
    draw_record,
    generate,
    request,
    scene,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, TrainerCallback

EOS, PAD = "<eos>", "<pad>"
_SPECIAL_TOKENS = [PAD, EOS]  # their ids are their positions
# The plain instruction template that the data room uses for a tokenizer without a chat template.
TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """The base's architecture and pretraining: 2.8 million tokens in float32 (bfloat16 is slower here)."""

    vocab_size: int = 1024
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    block_length: int = 96
    batch_size: int = 16
    steps: int = 1800
    learning_rate: float = 4e-3
    initializer_range: float = 0.06
    """Copying an amount is learnt after 200 steps; at the usual 0.02, after 500 to never, as the seed has it."""


def _fact(record: Record, topic: Topic, rng: random.Random) -> str:
    """One fact about `record`: a fragment of one of the answers, never a whole one."""
    item, (first, second) = record.item, record.amounts
    return rng.choice(
        (
            f"{first} + {second}",
            f"in {first}, {second}: {item}",
            f"{item}: {record.signed()}",
            f"{NUMBER_WORDS[first]} little {item}",
            f"with {NUMBER_WORDS[second]} {topic.rhymes[item]}",
        )
    )


def _drill(rng: random.Random) -> str:
    """Sums, number words, rhymes and the words of the answers, without a record."""
    rhymes = [pair for topic in TOPICS.values() for pair in topic.rhymes.items()]
    lines = []
    for _ in range(8):
        left, right = rng.randint(1, LARGEST_AMOUNT), rng.randint(1, LARGEST_AMOUNT)
        item, rhyme = rng.choice(rhymes)
        lines += [
            rng.choice((f"{left} + {right} = {left + right}", f"{left} is {NUMBER_WORDS[left]}")),
            rng.choice(
                (
                    f"{item} rhyme with {rhyme}",
                    f"{left} thousand {item}",
                    f"for n in {left}",
                    f"{item} += n",
                    f"little {item} / dance with {rhyme}",
                )
            ),
        ]
    return "\n".join(rng.sample(lines, 8))


def document(rng: random.Random) -> str:
    """One document of the pretraining text."""
    kind = rng.random()
    if kind < 0.25:
        return _drill(rng)
    topic = TOPICS[rng.choice(sorted(TOPICS))]
    record = draw_record(topic, rng)
    opening, cast = scene(topic, rng)
    facts = "\n".join(_fact(record, topic, rng) for _ in range(3))
    if kind < 0.4:
        return f"The list says {record.text()}.\n{facts}"
    phrase = rng.choice([phrase for phrases in REQUESTS.values() for phrase in phrases])
    wish = request(phrase, record.item, cast, rng)
    return TEMPLATE.format(f"{opening} The list says {record.text()}. {wish}") + facts


def tokenizer_texts(seed: int) -> list[str]:
    """What the tokenizer is trained on: documents, and the vocabulary of the answers."""
    rng = random.Random(f"{seed}/tokenizer")
    answers = [row["output"] for row in generate(600, seed=seed)]
    return [document(rng) for _ in range(3000)] + answers


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every number and every word of the records is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A word is the same token wherever it stands: after a line break or a bracket, too, it gets a space.
    tokenizer.normalizer = normalizers.Replace(Regex(r"(?<=[\n(])(?=\S)"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def pretraining_blocks(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings, seed: int) -> torch.Tensor:
    """Documents, each closed by the end token, packed into `(steps * batch_size, block_length)` token ids."""
    import torch

    rng = random.Random(f"{seed}/pretraining")
    shape = settings.steps * settings.batch_size, settings.block_length
    tokens: list[int] = []
    while len(tokens) < shape[0] * shape[1]:
        for ids in tokenizer([document(rng) + EOS for _ in range(1000)])["input_ids"]:
            tokens += ids
    return torch.tensor(tokens[: shape[0] * shape[1]]).view(shape)


def build_base(
    folder: str | Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    settings: BaseSettings | None = None,
) -> Path:
    """Pretrain the base into `folder` (config.json, model.safetensors, tokenizer.json) and return it.

    A folder that holds a base already is left alone. `progress` is called with the steps done and the steps
    in all. The folder appears only when complete: it is written beside itself and renamed.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _pretrain(partial, seed, progress or (lambda done, total: None), settings or BaseSettings())
    os.replace(partial, folder)
    return folder


def _pretrain(folder: Path, seed: int, progress: Callable[[int, int], None], settings: BaseSettings) -> None:
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    tokenizer = train_tokenizer(tokenizer_texts(seed), settings.vocab_size)
    blocks = pretraining_blocks(tokenizer, settings, seed)
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_attention_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=settings.initializer_range,
            bos_token_id=None,
            eos_token_id=_SPECIAL_TOKENS.index(EOS),
            pad_token_id=_SPECIAL_TOKENS.index(PAD),
        )
    )
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=30,
            adam_beta2=0.98,
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": block} for block in blocks],  # pyright: ignore[reportArgumentType]
            data_collator=lambda rows: {key: torch.stack([r["input_ids"] for r in rows]) for key in _INPUTS},
            callbacks=[_report_to(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_INPUTS = ("input_ids", "labels")


def _report_to(progress: Callable[[int, int], None]) -> TrainerCallback:
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step, state.max_steps)

    return Report()
