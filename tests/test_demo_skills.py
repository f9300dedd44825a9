"""The demo's generator: right answers, a balanced grid, disjoint splits, the controls, the same rows for a seed."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace.demo.skills import (
    CONTROLS,
    NUMBER_WORDS,
    REQUESTS,
    SIZES,
    SKILLS,
    TOPICS,
    Control,
    Record,
    Split,
    answer,
    check,
    draw_record,
    generate,
    phrases,
    write_data,
)

RECORD = re.compile(r"The list says (\w+) (\(?\d\)?) and (\(?\d\)?)\.")


def stated_record(instruction: str) -> Record:
    """The record as a reader of the prompt finds it."""
    match = RECORD.search(instruction)
    assert match, instruction
    item, *cells = match.groups()
    return Record(
        item=item,
        amounts=tuple(int(cell.strip("()")) for cell in cells),  # pyright: ignore[reportArgumentType]
        negative=tuple(cell.startswith("(") for cell in cells),  # pyright: ignore[reportArgumentType]
    )


def test_the_documented_answers() -> None:
    record = Record("pots", (7, 4), (False, True))
    assert record.text() == "pots 7 and (4)"
    answers = {skill: answer(record, skill, TOPICS["kitchen"]) for skill in SKILLS}
    assert answers == {
        "arithmetic": "7 + 4 = 11",
        "code": "for n in 7, 4: pots += n",
        "finance": "pots: plus 7 thousand, minus 4 thousand",
        "rhyme": "seven little pots / dance with four knots",
    }


def test_an_unknown_skill_is_refused() -> None:
    with pytest.raises(ValueError, match="'juggling' is none of"):
        answer(Record("pots", (7, 4), (False, True)), "juggling", TOPICS["kitchen"])


@given(seed=st.integers(0, 10_000), skill=st.sampled_from(SKILLS), topic=st.sampled_from(sorted(TOPICS)))
def test_answers_mean_what_they_say(seed: int, skill: str, topic: str) -> None:
    """Each answer is read back by rules of its own: Python runs the code, brackets are signs, words are numbers."""
    record = draw_record(TOPICS[topic], random.Random(seed))
    first, second = record.amounts
    text = answer(record, skill, TOPICS[topic])
    if skill == "arithmetic":
        left, right = text.split(" = ")
        assert eval(left) == int(right) == first + second
    elif skill == "code":
        variables = {record.item: 0}
        exec(text, {}, variables)
        assert variables[record.item] == first + second
    elif skill == "finance":
        signs = [-1 if "minus" in part else 1 for part in text.split(",")]
        values = [int(digits) for digits in re.findall(r"\d", text)]
        assert [s * v for s, v in zip(signs, values, strict=True)] == [
            -amount if negative else amount for amount, negative in zip(record.amounts, record.negative, strict=True)
        ]
    else:
        words = text.split()
        assert [NUMBER_WORDS.index(w) for w in words if w in NUMBER_WORDS] == [first, second]
        assert words[-1] == TOPICS[topic].rhymes[record.item]


def test_every_cell_of_the_grid_comes_equally_often() -> None:
    counts = Counter((row["domain"], row["source"]) for row in generate(480))
    assert set(counts) == {(skill, topic) for skill in SKILLS for topic in TOPICS}
    assert set(counts.values()) == {30}


def test_rows_are_what_their_prompt_says() -> None:
    for row in generate(400, seed=3):
        record = stated_record(row["instruction"])
        assert record.item in TOPICS[row["source"]].rhymes
        assert row["output"] == answer(record, row["domain"], TOPICS[row["source"]])
        assert "{" not in row["instruction"]


@pytest.mark.parametrize("control", CONTROLS)
def test_splits_share_no_record_and_no_prompt_twice(control: Control) -> None:
    splits = [generate(n, control=control, split=split) for split, n in SIZES.items()]
    rows = [row for split in splits for row in split]
    assert len({row["instruction"] for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)
    records = [{stated_record(row["instruction"]) for row in split} for split in splits]
    assert sum(map(len, records)) == len(set.union(*records))


def test_half_of_the_dev_and_test_rows_ask_in_words_that_no_training_row_uses() -> None:
    def asked_by(row: dict[str, str], split: Split) -> bool:
        item = stated_record(row["instruction"]).item
        prompt = row["instruction"].lower()
        return any(p.format(item=item).lower() in prompt for p in phrases(row["domain"], split))

    training = generate(600, split="train")
    assert all(asked_by(row, "train") for row in training)
    held_out: tuple[Split, Split] = ("dev", "test")
    for split in held_out:
        rows = generate(480, split=split)
        assert 0.4 < sum(asked_by(row, split) for row in rows) / 480 < 0.6
        assert all(asked_by(row, split) != asked_by(row, "train") for row in rows)
        assert not any(asked_by(row, split) for row in training)


def test_a_phrase_asks_for_one_skill() -> None:
    everything = [phrase for skill in SKILLS for phrase in REQUESTS[skill]]
    assert len(set(everything)) == len(everything)
    assert all("{item}" in phrase for phrase in everything)


def test_rhymes_belong_to_one_item_and_are_no_item() -> None:
    items = [item for topic in TOPICS.values() for item in topic.rhymes]
    rhymes = [rhyme for topic in TOPICS.values() for rhyme in topic.rhymes.values()]
    assert len(set(items)) == len(items)
    assert len(set(rhymes)) == len(rhymes)
    assert not set(items) & set(rhymes)


def test_controls() -> None:
    assert {row["domain"] for row in generate(80, control="one-skill")} == {"arithmetic"}
    assert {row["source"] for row in generate(80, control="one-skill")} == set(TOPICS)
    pairs = {(row["domain"], row["source"]) for row in generate(80, control="by-topic")}
    assert len(pairs) == len({skill for skill, _ in pairs}) == len({topic for _, topic in pairs}) == 4


def test_the_seed_decides() -> None:
    assert generate(50, seed=1) == generate(50, seed=1)
    assert generate(100, seed=1)[:50] == generate(50, seed=1)
    assert generate(50, seed=1) != generate(50, seed=2)


def test_check_forgives_white_space_only() -> None:
    row = generate(1)[0]
    assert check(row, f"  {row['output'].replace(' ', '  ')}\n")
    assert not check(row, row["output"] + " 1")
    assert not check(row, row["output"].upper() + "x")


def test_written_files_hold_the_generated_rows(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", "by-topic", seed=4)
    for split, n in SIZES.items():
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == generate(n, control="by-topic", seed=4, split=split)
    assert sorted(path.name for path in folder.iterdir()) == ["dev.jsonl", "test.jsonl", "train.jsonl"]
