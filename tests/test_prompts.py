import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace.errors import DataError
from gradientspace.prompts import routing_text


def test_a_plain_prompt_is_read_as_it_is_without_outer_white_space():
    assert routing_text("  2 + 2 = ?\n") == "2 + 2 = ?"


def test_user_turns_are_read_in_order_and_the_answers_are_not():
    messages = [
        {"role": "system", "content": "You are a calculator."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "and 3 + 3?"}, {"type": "image_url"}]},
        {"role": "assistant", "content": None},
    ]
    assert routing_text(messages) == "2 + 2?\nand 3 + 3?"


def test_system_turns_are_read_only_where_no_user_speaks():
    system = {"role": "system", "content": "Write a haiku."}
    assert routing_text([system]) == "Write a haiku."
    assert routing_text([system, {"role": "user", "content": "  "}]) == "Write a haiku."
    assert routing_text([]) == ""


def test_a_long_prompt_keeps_its_beginning_and_its_end():
    text = routing_text("Translate this. " + "word " * 5_000 + "Into French, please.")
    assert len(text) <= 1_000
    assert text.startswith("Translate this.")
    assert text.endswith("Into French, please.")


@given(st.text(max_size=20), st.integers(0, 200), st.text(max_size=20))
def test_reading_twice_changes_nothing(head, repeats, tail):
    once = routing_text(head + " filler\n" * repeats + tail)
    assert routing_text(once) == once


@pytest.mark.parametrize("prompt", [None, 3, [{"content": "no role"}], ["text"], [{"role": "user", "content": [3]}]])
def test_anything_else_is_refused_in_one_line(prompt):
    with pytest.raises(DataError) as error:
        routing_text(prompt)
    assert "\n" not in str(error.value)
    assert "role and content" in str(error.value)
