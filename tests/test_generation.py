"""Micro-batches of mixed experts against transformers' own generation with plain PEFT; text, stops and sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_stacked import base_of, plain_logits, prompts, save_experts

from gradientspace.errors import DataError
from gradientspace.generation import Request, _sample, generate
from gradientspace.stacked import BASE, StackedExperts
from gradientspace.text_stream import TextStream

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

END = 96


class Numbers:
    """A tokenizer whose tokens read as their numbers."""

    pad_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return "".join(f"{i} " for i in ids if not (skip_special_tokens and i == END))


def answers(experts, requests, **options):
    """Text, number of tokens and reason of every row."""
    texts, counts, reasons = [""] * len(requests), [0] * len(requests), [None] * len(requests)
    for piece in generate(experts, requests, Numbers(), [END], **options):
        assert reasons[piece.row] is None
        texts[piece.row] += piece.text
        counts[piece.row] += piece.n_tokens
        reasons[piece.row] = piece.finish_reason
    return texts, counts, reasons


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "opt", "mixtral"])
def test_greedy_equals_transformers_generate_with_one_peft_adapter(name, tmp_path):
    folders = save_experts(name, tmp_path)
    texts, rows, lengths = prompts(5, 17, 9, 12), [1, BASE, 2, 1], [12, 3, 12, 7]
    requests = [Request(text, row, max_new_tokens=n) for text, row, n in zip(texts, rows, lengths, strict=True)]
    with StackedExperts(base_of(name), folders) as experts:
        found, counts, _ = answers(experts, requests)
    for i, (text, row, n) in enumerate(zip(texts, rows, lengths, strict=True)):
        base = base_of(name)
        model = base if row == BASE else PeftModel.from_pretrained(base, str(list(folders.values())[row])).eval()
        ids = model.generate(
            input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long),
            max_new_tokens=n, do_sample=False, eos_token_id=END, pad_token_id=0,
        )[0, len(text) :]  # fmt: skip
        assert found[i] == Numbers().decode(ids.tolist())
        assert counts[i] == len(ids)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    with StackedExperts(base_of("llama"), save_experts("llama", tmp_path_factory.mktemp("experts"))) as experts:
        experts.folders = {f"e{k}": None for k in range(3)}
        yield experts


def test_rows_end_for_their_own_reasons(experts):
    text = prompts(6)[0]
    (free,), _, _ = answers(experts, [Request(text, 0, 12)])
    words = free.split()
    stop = f"{words[3]} {words[4]}"
    requests = [
        Request(text, 0, 12),
        Request(text, 0, 12, stop=("never", stop)),
        Request(text, 0, 0),
        Request(text, 0, 5),
    ]
    texts, counts, reasons = answers(experts, requests)
    assert texts == [free, free[: free.index(stop)], "", " ".join(words[:5]) + " "]
    assert reasons == ["length", "stop", "length", "length"]
    assert counts[2:] == [0, 5]
    end = int(words[2])
    pieces = list(generate(experts, requests[:1], Numbers(), [end]))
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert "".join(piece.text for piece in pieces) == f"{words[0]} {words[1]} {end} "[: len(words[0] + words[1]) + 2]
    ignoring = Request(text, 0, 12, ignore_end=True)
    assert "".join(p.text for p in generate(experts, [ignoring], Numbers(), [end])) == free


def test_a_cancelled_row_leaves_the_others_alone(experts):
    requests = [Request(text, 1, 8) for text in prompts(6, 4)]
    expected, _, _ = answers(experts, requests)
    asked = []

    def is_cancelled(row):
        asked.append(row)
        return row == 0 and len(asked) > 4

    texts, counts, reasons = answers(experts, requests, is_cancelled=is_cancelled)
    assert reasons == ["cancelled", "length"]
    assert texts[1] == expected[1]
    assert counts == [2, 8]


def test_sampling_follows_its_seed_and_its_limits(experts):
    text = prompts(6)[0]
    greedy = answers(experts, [Request(text, 0, 10)])[0][0]
    hot = Request(text, 0, 10, temperature=5.0, seed=7)
    alone = answers(experts, [hot])[0][0]
    assert alone != greedy
    assert answers(experts, [Request(text, 1, 10), hot, Request(text, 0, 10)])[0] == [
        answers(experts, [Request(text, 1, 10)])[0][0],
        alone,
        greedy,
    ]
    for limit in ({"top_k": 1}, {"top_p": 1e-9}):
        assert answers(experts, [Request(text, 0, 10, temperature=5.0, seed=7, **limit)])[0] == [greedy]


def test_sampled_frequencies_are_those_of_the_model(experts, tmp_path):
    text = prompts(6)[0]
    requests = [Request(text, BASE, 1, temperature=1.5, top_k=3, seed=seed) for seed in range(300)]
    found, _, _ = answers(experts, requests)
    logits = plain_logits("llama", {}, BASE, text)[-1] / 1.5
    top = logits.topk(3)
    for token, p in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
        assert found.count(f"{token} ") / 300 == pytest.approx(p, abs=4 * (p * (1 - p) / 300) ** 0.5)


def test_logprobs_of_answer_and_prompt(experts):
    short, long = prompts(4, 9)
    request = Request(short, BASE, 3, n_logprobs=2, prompt_logprobs=True)
    pieces = [p for p in generate(experts, [request, Request(long, 1, 3)], Numbers(), [END]) if p.row == 0]
    ids = short + [token.token for piece in pieces for token in piece.logprobs]
    log_p = plain_logits("llama", {}, BASE, ids).log_softmax(-1)
    listed = pieces[0].prompt_logprobs + [token for piece in pieces for token in piece.logprobs]
    assert [token.token for token in listed] == ids
    assert listed[0].logprob is None
    for at, token in enumerate(listed[1:]):
        assert token.logprob == pytest.approx(float(log_p[at, ids[at + 1]]), abs=1e-4)
        assert [i for i, _ in token.top] == log_p[at].topk(2).indices.tolist()


def test_what_does_not_fit_is_refused(experts):
    limit = experts.model.config.max_position_embeddings
    with pytest.raises(DataError, match=f"over the model's context of {limit} tokens"):
        list(generate(experts, [Request([1] * limit, 0, 1)], Numbers(), []))
    with pytest.raises(DataError, match="has no tokens"):
        list(generate(experts, [Request([], 0, 1)], Numbers(), []))


# --------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def tokenizer(micro_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(micro_model)


@given(text=st.text(max_size=40), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(deadline=None, max_examples=60)
def test_pieces_joined_are_the_text_up_to_the_first_stop(tokenizer, text, stops):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream, pieces = TextStream(tokenizer, stops), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    joined = "".join(pieces)
    assert whole.startswith(joined)
    assert not any(stop in joined for stop in stops)
    if any(stop in whole for stop in stops):
        assert stream.stopped
        assert any(whole[len(joined) :].startswith(stop) for stop in stops)
    else:
        assert joined == whole


def test_unfinished_characters_and_beginnings_of_stops_are_held_back(tokenizer):
    ids = tokenizer("a€b", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert pieces == ["a", "", "", "€", "b"]
    cut = TextStream(tokenizer)
    assert [cut.push(token) for token in ids[:2]] == ["a", ""]
    assert cut.finish() == "\ufffd"
    stream = TextStream(tokenizer, ["xyz"])
    pieces = [stream.push(tokenizer.convert_tokens_to_ids(c)) for c in "axyaxyz"]
    assert pieces == ["a", "", "", "xya", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-320}, {"temperature": 1e-45}, {"temperature": 1.0, "top_p": 5e-324}]
)
def test_the_smallest_temperature_and_share_leave_the_likeliest_token(options):
    logits = torch.tensor([1.0, 90.0, -30.0, 89.0])
    assert _sample(logits, Request([1], 0, **options), torch.Generator().manual_seed(0)) == 1
