"""The demo's base: a folder that transformers loads, written once and whole, the same for a seed."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from test_demo_skills import stated_record

from gradientspace.demo.base import (
    TEMPLATE,
    BaseSettings,
    build_base,
    document,
    pretraining_blocks,
    tokenizer_texts,
    train_tokenizer,
)
from gradientspace.demo.skills import NUMBER_WORDS, SKILLS, TOPICS, answer, generate

TINY = BaseSettings(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, steps=3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(tokenizer_texts(seed=0), BaseSettings().vocab_size)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("demo") / "base", seed=0, settings=TINY)


def test_no_document_answers_a_request() -> None:
    rng = random.Random(0)
    asked = 0
    for _ in range(2000):
        text = document(rng)
        if "### Response:\n" not in text:
            continue
        asked += 1
        prompt, response = text.split("### Response:\n")
        record = stated_record(prompt)
        topic = next(t for t in TOPICS.values() if record.item in t.rhymes)
        assert not any(answer(record, skill, topic) in response for skill in SKILLS)
    assert asked > 200


def test_words_of_records_and_answers_are_single_tokens(tokenizer) -> None:
    items = [word for topic in TOPICS.values() for pair in topic.rhymes.items() for word in pair]
    for word in [*items, *NUMBER_WORDS[1:], *map(str, range(1, 10)), "plus", "minus", "thousand"]:
        assert len(tokenizer(word)["input_ids"]) == 1, word


def test_a_word_is_the_same_token_at_a_line_start_and_in_brackets(tokenizer) -> None:
    alone = tokenizer("7")["input_ids"]
    for text in ("pots 7", "pots (7", "pots\n7"):
        assert tokenizer(text)["input_ids"][-1:] == alone


def test_pieces_of_the_plain_template_are_tokens_of_the_whole(tokenizer) -> None:
    """The data room tokenises prompt and answer one by one; the base was pretrained on the whole."""
    for row in generate(50):
        prompt = TEMPLATE.format(row["instruction"])
        head = prompt.removesuffix("### Response:\n")
        pieces = [head, "### Response:\n", row["output"]]
        joined = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
        assert joined == tokenizer(prompt + row["output"])["input_ids"]


def test_answers_survive_the_tokenizer(tokenizer) -> None:
    for row in generate(200):
        decoded = tokenizer.decode(tokenizer(row["output"])["input_ids"])
        assert " ".join(decoded.split()) == row["output"]


def test_blocks_have_the_promised_shape(tokenizer) -> None:
    blocks = pretraining_blocks(tokenizer, TINY, seed=0)
    assert blocks.shape == (TINY.steps * TINY.batch_size, TINY.block_length)
    assert int(blocks.max()) < len(tokenizer)
    assert (blocks == tokenizer.eos_token_id).any()


def test_the_folder_is_an_ordinary_model(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {path.name for path in base.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    logits = model(**tokenizer("The list says pots 7 and (4).", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()


def test_a_finished_base_is_left_alone(base: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    steps: list[int] = []
    assert build_base(base, seed=5, progress=lambda done, total: steps.append(done), settings=TINY) == base
    assert {path: path.stat().st_mtime_ns for path in base.iterdir()} == before
    assert steps == []


def test_an_interrupted_base_starts_again_and_ends_with_the_same_bytes(base: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        assert total == TINY.steps
        raise Killed

    again = tmp_path / "again"
    with pytest.raises(Killed):
        build_base(again, seed=0, progress=kill, settings=TINY)
    assert not again.exists()
    build_base(again, seed=0, settings=TINY)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (base / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_another_seed_makes_another_base(base: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", seed=1, settings=TINY)
    assert (other / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_the_demo_works_on_one_thread_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums on another number of threads are in another order: another base, and other numbers than the README's."""
    from gradientspace import pipeline
    from gradientspace.demo import base, command

    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(base, "build_base", lambda folder, *rest: seen.append(torch.get_num_threads()) or folder)
    monkeypatch.setattr(pipeline, "run", lambda config: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        command._run("none", "demo", tmp_path, 0)
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_text_and_rows_are_those_that_the_committed_tables_were_made_from() -> None:
    """A phrase more or less gives another base: every committed table of the demo would have to be made anew."""
    rng = random.Random("0/pretraining")
    read = {
        "pretraining": [document(rng) for _ in range(500)],
        "train": generate(480, split="train"),
        "dev": generate(480, split="dev"),
        "test": generate(480, split="test"),
    }
    found = {name: hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16] for name, text in read.items()}
    assert found == {
        "pretraining": "07b86475aab9e423",
        "train": "a33ccc3800502679",
        "dev": "7f13de73a641dc84",
        "test": "4f59d8fe630df877",
    }
