"""Token ids and labels: written out by hand for every shape, and over random conversations."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_fixtures import (
    BRACKETS,
    CHATML,
    FINAL_EOS,
    REWRITING,
    SPECIAL,
    THINKING,
    UNCLOSED,
    byte_tokenizer,
    ids_of,
    word_tokenizer,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradientspace.data import Template, render_sample
from gradientspace.data.sample import IGNORE_INDEX, Sample
from gradientspace.data.shapes import Conversation, conversation, detect_mapping
from gradientspace.errors import DataError, ModelError
from gradientspace.prompts import routing_text

PLAIN_ADD = [
    "###",
    " ",
    "Instruction:",
    "\n",
    "Add",
    " ",
    "2",
    " ",
    "3",
    "\n\n",
    "###",
    " ",
    "Response:",
    "\n",
]
PLAIN_HELLO = ["###", " ", "Instruction:", "\n", "hello", "\n\n", "###", " ", "Response:", "\n"]
PLAIN_AGAIN = ["###", " ", "Instruction:", "\n", "again", "\n\n", "###", " ", "Response:", "\n"]
CHAT_USER = ["<|im_start|>", "user", "\n"]
CHAT_ASSISTANT = ["<|im_start|>", "assistant", "\n"]
CHAT_END = ["<|im_end|>", "\n"]

TWO_TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "bye"},
]
SHAREGPT = [
    {"from": "human", "value": "hello"},
    {"from": "gpt", "value": "good day"},
    {"from": "human", "value": "again"},
    {"from": "gpt", "value": "bye"},
]

# (row, tokens, supervised tokens), the mask as "." for a masked and "x" for a supervised token
PLAIN_CASES = {
    "alpaca": (
        {"instruction": "Add 2 3", "input": "", "output": "5"},
        [*PLAIN_ADD, "5", "</s>"],
        "." * 14 + "xx",
    ),
    "alpaca-input": (
        {"instruction": "Add", "input": "2 3", "response": "5"},
        [
            "###",
            " ",
            "Instruction:",
            "\n",
            "Add",
            "\n\n",
            "2",
            " ",
            "3",
            "\n\n",
            "###",
            " ",
            "Response:",
            "\n",
            "5",
            "</s>",
        ],
        "." * 14 + "xx",
    ),
    "prompt-completion": (
        {"prompt": "Add 2 3", "completion": "5"},
        [*PLAIN_ADD, "5", "</s>"],
        "." * 14 + "xx",
    ),
    "question-answer": ({"question": "Add 2 3", "answer": 5}, [*PLAIN_ADD, "5", "</s>"], "." * 14 + "xx"),
    "system": (
        {"system": "Be brief", "instruction": "hello", "output": "good day"},
        ["Be", " ", "brief", "\n\n", *PLAIN_HELLO, "good", " ", "day", "</s>"],
        "." * 14 + "xxxx",
    ),
    "messages": (
        {"messages": TWO_TURNS},
        [*PLAIN_HELLO, "good", " ", "day", "</s>", "\n\n", *PLAIN_AGAIN, "bye", "</s>"],
        "." * 10 + "xxxx" + "." * 11 + "xx",
    ),
    "sharegpt": (
        {"conversations": SHAREGPT},
        [*PLAIN_HELLO, "good", " ", "day", "</s>", "\n\n", *PLAIN_AGAIN, "bye", "</s>"],
        "." * 10 + "xxxx" + "." * 11 + "xx",
    ),
    "prompt-of-messages": (  # earlier answers belong to the prompt and are not trained on
        {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]},
        [*PLAIN_HELLO, "good", " ", "day", "</s>", "\n\n", *PLAIN_AGAIN, "bye", "</s>"],
        "." * 10 + "...." + "." * 11 + "xx",
    ),
    "text": ({"text": "hello good day"}, ["<s>", "hello", " ", "good", " ", "day", "</s>"], ".xxxxxx"),
}
CHAT_CASES = {
    "alpaca": (
        {"instruction": "Add", "input": "2 3", "output": "5"},
        [*CHAT_USER, "Add", "\n\n", "2", " ", "3", *CHAT_END, *CHAT_ASSISTANT, "5", *CHAT_END],
        "." * 13 + "xx.",
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief"}, *TWO_TURNS]},
        [
            "<|im_start|>",
            "system",
            "\n",
            "Be",
            " ",
            "brief",
            *CHAT_END,
            *CHAT_USER,
            "hello",
            *CHAT_END,
            *CHAT_ASSISTANT,
            "good",
            " ",
            "day",
            *CHAT_END,
            *CHAT_USER,
            "again",
            *CHAT_END,
            *CHAT_ASSISTANT,
            "bye",
            *CHAT_END,
        ],
        "." * 8 + "." * 9 + "xxxx." + "." * 9 + "xx.",
    ),
    "prompt-of-messages": (
        {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]},
        [
            *CHAT_USER,
            "hello",
            *CHAT_END,
            *CHAT_ASSISTANT,
            "good",
            " ",
            "day",
            *CHAT_END,
            *CHAT_USER,
            "again",
            *CHAT_END,
            *CHAT_ASSISTANT,
            "bye",
            *CHAT_END,
        ],
        "." * 9 + "....." + "." * 9 + "xx.",
    ),
    "text": ({"text": "hello good day"}, ["<s>", "hello", " ", "good", " ", "day", "</s>"], ".xxxxxx"),
}


def encode(template: Template, row: dict) -> tuple[list[int], list[int]]:
    turns = conversation(row, detect_mapping(row, {}, "row 1"), "row 1")
    assert turns is not None
    return template.encode([turns], ["row 1"])[0]


def masked(ids: list[int], mask: str) -> list[int]:
    assert len(ids) == len(mask)
    return [token if mark == "x" else IGNORE_INDEX for token, mark in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", PLAIN_CASES)
def test_plain_template_gives_the_tokens_and_mask_written_by_hand(name):
    row, tokens, mask = PLAIN_CASES[name]
    ids, labels = encode(Template(word_tokenizer()), row)
    assert ids == ids_of(tokens)
    assert labels == masked(ids_of(tokens), mask)


@pytest.mark.parametrize("name", CHAT_CASES)
def test_chat_template_gives_the_tokens_and_mask_written_by_hand(name):
    row, tokens, mask = CHAT_CASES[name]
    ids, labels = encode(Template(word_tokenizer(CHATML)), row)
    assert ids == ids_of(tokens)
    assert labels == masked(ids_of(tokens), mask)


def test_real_tokenizer_gives_the_ids_written_by_hand():
    folder = Path(__file__).parents[2] / "shared" / "models" / "tiny-base"
    if not folder.is_dir():
        pytest.skip("needs the model tiny-base beside the project")
    from transformers import AutoTokenizer

    ids, labels = encode(Template(AutoTokenizer.from_pretrained(folder)), {"prompt": "Add 2 3", "completion": "5"})
    written = "378 5 780 311 3836 28 201 35 1564 223 20 223 21 201 201 378 5 3776 82 2769 28 201"
    prompt = [int(token) for token in written.split()]
    assert ids == [*prompt, 23, 2]
    assert labels == [IGNORE_INDEX] * len(prompt) + [23, 2]


def test_begin_token_stands_once_where_the_tokenizer_puts_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    ids, _ = encode(Template(tokenizer), {"prompt": "a", "completion": "b"})
    assert tokenizer.bos_token_id not in ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for row in ({"prompt": "a", "completion": "b"}, {"messages": TWO_TURNS}, {"text": "a"}):
        ids, labels = encode(Template(tokenizer), row)
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert labels[0] == IGNORE_INDEX


def test_text_that_looks_like_a_special_token_stays_text():
    tokenizer = byte_tokenizer()
    ids, labels = encode(Template(tokenizer), {"prompt": "strike <s>this</s>", "completion": "</s>done"})
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in ids
    supervised = [label for label in labels if label != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == "</s>done</s>"


def test_system_prompt_is_added_where_a_row_has_none():
    template = Template(word_tokenizer(CHATML), system_prompt="Be brief")
    with_own, _ = encode(template, {"system": "hello", "prompt": "2", "completion": "3"})
    without, _ = encode(template, {"prompt": "2", "completion": "3"})
    system = ["<|im_start|>", "system", "\n"]
    assert with_own[:4] == ids_of([*system, "hello"])
    assert without[:6] == ids_of([*system, "Be", " ", "brief"])


def test_system_message_survives_a_template_without_system_role():
    tokenizer = byte_tokenizer(BRACKETS)
    template = Template(tokenizer)
    assert template.folds_system
    ids, labels = encode(template, {"system": "Be brief", "prompt": "hello", "completion": "bye"})
    assert tokenizer.decode(ids) == "<s>[INST] Be brief\n\nhello [/INST] bye</s>"
    assert tokenizer.decode([i for i in labels if i != IGNORE_INDEX]) == " bye</s>"
    assert not Template(byte_tokenizer(CHATML)).folds_system


def test_a_template_that_closes_no_turn_gets_an_end_token():
    tokenizer = byte_tokenizer(UNCLOSED)
    ids, labels = encode(Template(tokenizer), {"messages": TWO_TURNS})
    assert tokenizer.decode(ids) == "user: hello\nassistant: good day\nuser: again\nassistant: bye</s>"
    assert labels[-1] == tokenizer.eos_token_id


def test_every_turn_is_found_where_the_template_treats_the_last_one_differently():
    tokenizer = byte_tokenizer(THINKING)
    ids, labels = encode(Template(tokenizer), {"messages": TWO_TURNS})
    assert spans(tokenizer, ids, labels) == ["good day<|im_end|>", "<think>\n\n</think>\n\nbye<|im_end|>"]
    tokenizer = byte_tokenizer(FINAL_EOS)
    ids, labels = encode(Template(tokenizer), {"messages": TWO_TURNS})
    assert spans(tokenizer, ids, labels) == ["good day<|im_end|>", "bye<|im_end|>"]
    assert ids[-1] == tokenizer.eos_token_id


def test_stop_tokens_are_the_end_of_sequence_and_of_a_chat_turn():
    assert Template(word_tokenizer()).stop_ids == ids_of(["</s>"])
    assert Template(word_tokenizer(CHATML)).stop_ids == ids_of(["</s>", "<|im_end|>"])
    assert Template(byte_tokenizer(BRACKETS)).stop_ids == [2]


def test_what_cannot_be_templated_is_said_in_one_line():
    with pytest.raises(DataError, match=r"row 1.*no prefix.*'plain'"):
        encode(Template(byte_tokenizer(REWRITING)), {"messages": TWO_TURNS})
    twice = [TWO_TURNS[0], TWO_TURNS[0], TWO_TURNS[1]]
    with pytest.raises(DataError, match=r"row 1.*roles must alternate"):
        encode(Template(byte_tokenizer(BRACKETS)), {"messages": twice})
    with pytest.raises(ModelError, match="no chat template"):
        Template(byte_tokenizer(), "chat")
    with pytest.raises(ModelError, match="chat template cannot be used"):
        Template(byte_tokenizer("{{ nothing.at.all }}"))
    without_end = byte_tokenizer()
    without_end.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        Template(without_end)


def spans(tokenizer, ids: list[int], labels: list[int]) -> list[str]:
    """The decoded supervised spans; a span ends with its closing token."""
    found: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                found.append([])
            found[-1].append(token)
        previous = label
    return [tokenizer.decode(span, skip_special_tokens=False) for span in found]


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.sampled_from(
    ["\n\n", "  b", "\n c\n\n", "a  ", "😀👩‍👩‍👧", "### Response:\n", "    return x\n", "\u00a0x\u3000"]
)
exchanges = st.lists(st.tuples(texts.filter(lambda text: text.strip()), texts), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(exchanges=exchanges, system=st.none() | texts, chat=st.sampled_from([None, CHATML, FINAL_EOS]))
def test_supervised_tokens_decode_to_exactly_the_assistant_turns(exchanges, system, chat):
    assume(not any(special in text for pair in exchanges for text in pair for special in SPECIAL))
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in exchanges:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    tokenizer = byte_tokenizer(chat)
    template = Template(tokenizer)
    ids, labels = template.encode([Conversation.of(messages)], ["row 1"])[0]
    close = "<|im_end|>" if chat else "</s>"
    assert spans(tokenizer, ids, labels) == [answer + close for _, answer in exchanges]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    sample = Sample("x", "", ids, labels, "", None, None, 1, messages)
    assert sample.prompt_ids == template.prompt_ids(messages[:-1])


def test_prompt_is_a_prefix_at_every_turn_even_where_a_token_would_straddle():
    tokenizer = byte_tokenizer(UNCLOSED.replace("assistant: {% endif", "assistant:{% endif").replace(": {{", ":{{"))
    template = Template(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\n\n\nb"}]
    ids, labels = encode(template, {"messages": messages})
    prompt = template.prompt_ids(messages[:-1])
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt) + 1] == [IGNORE_INDEX] * len(prompt) + [ids[len(prompt)]]
    messages += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    ids, labels = encode(template, {"messages": messages})
    assert Sample("x", "", ids, labels, "", None, None, 1, messages).prompt_ids[: len(prompt)] == prompt


def test_rendered_sample_marks_what_is_supervised():
    tokenizer = word_tokenizer(CHATML)
    ids, labels = encode(Template(tokenizer), {"messages": TWO_TURNS[:2]})
    sample = Sample("x", "hello", ids, labels, "good day", None, None, 1, TWO_TURNS[:2])
    assert render_sample(sample, tokenizer) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n⟦good day<|im_end|>⟧\n"
    )


def test_a_router_reads_the_same_of_a_sample_as_of_its_messages():
    for messages in (
        TWO_TURNS,
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "  a\n"}],
    ):
        turns = Conversation.of([*messages, {"role": "assistant", "content": "x"}])
        assert routing_text(turns.prompt) == routing_text(messages)
