"""The server as the official OpenAI client and curl see it."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving_fixtures import listening, micro_app, routed  # noqa: F401

from gradientspace.inference import RoutedModel
from gradientspace.run_folder import Run

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn|websockets")]

PROMPT = "Repeat these words: cat dog sky"
CHAT = [{"role": "user", "content": PROMPT}]
NAMES = ["expert_0", "expert_1", "shared", "base"]


@pytest.fixture(scope="module")
def url(finished_run: Run):
    with listening(micro_app(finished_run)) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(**options) -> dict:
    return {"temperature": 0, "max_tokens": 6, **options}


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["auto", *NAMES]
    assert client.models.retrieve("expert_1").id == "expert_1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("expert_9")


def test_chat_is_routed_and_equals_the_routed_model(client, routed: RoutedModel) -> None:  # noqa: F811
    response = client.chat.completions.with_raw_response.create(model="auto", messages=CHAT, **greedy())
    answer, decision = response.parse(), routed.route(PROMPT)
    assert answer.choices[0].message.content.strip() == routed.generate(CHAT, max_new_tokens=6)
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == response.headers["x-gradientspace-expert"] == decision.name
    assert float(response.headers["x-gradientspace-probability"]) == pytest.approx(decision.probability, abs=1e-3)
    assert response.headers["x-gradientspace-runner-up"] == f"expert_{decision.runner_up}"
    assert response.headers["x-gradientspace-reason"] == "routed"
    assert float(response.headers["x-gradientspace-milliseconds"]) >= 0
    assert answer.usage.prompt_tokens == len(routed.template.prompt_ids(CHAT))
    assert 0 < answer.usage.completion_tokens <= 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_named_model_answers_itself(client, routed: RoutedModel, name: str) -> None:  # noqa: F811
    answer = client.chat.completions.with_raw_response.create(model=name, messages=CHAT, **greedy())
    assert answer.headers["x-gradientspace-reason"] == ("base" if name == "base" else "named")
    expected = routed.generate(CHAT, expert=routed.number(name), max_new_tokens=6)
    assert answer.parse().choices[0].message.content.strip() == expected


def test_streams_are_the_answer_in_pieces(client) -> None:
    whole = client.chat.completions.create(model="auto", messages=CHAT, **greedy())
    with client.chat.completions.with_streaming_response.create(
        model="auto", messages=CHAT, stream=True, stream_options={"include_usage": True}, **greedy()
    ) as response:
        assert response.headers["x-gradientspace-expert"] == whole.model
        events = list(response.parse())
    assert "".join(c.delta.content or "" for e in events for c in e.choices) == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert [c.finish_reason for e in events for c in e.choices][-1] == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage
    text = client.completions.create(model="base", prompt="one two", **greedy())
    pieces = client.completions.create(model="base", prompt="one two", stream=True, **greedy())
    assert "".join(p.choices[0].text for p in pieces) == text.choices[0].text  # every event has a choice: no usage


def test_mixed_concurrent_requests_get_their_own_answers(client, routed: RoutedModel) -> None:  # noqa: F811
    def ask(i: int) -> tuple[str, str]:
        name = NAMES[i % 4]
        messages = [{"role": "user", "content": f"{PROMPT} {i}"}]
        answer = client.chat.completions.create(model=name, messages=messages, **greedy())
        return answer.choices[0].message.content.strip(), routed_answer(messages, name)

    lock = threading.Lock()

    def routed_answer(messages: list, name: str) -> str:
        with lock:  # the reference takes one batch at a time
            return routed.generate(messages, expert=routed.number(name), max_new_tokens=6)

    with ThreadPoolExecutor(12) as pool:
        for found, expected in pool.map(ask, range(24)):
            assert found == expected


def test_several_prompts_and_choices(client, routed: RoutedModel) -> None:  # noqa: F811
    prompts = ["Count the letters of: sun sea", "Repeat these words: one two"]
    response = client.completions.with_raw_response.create(model="auto", prompt=prompts, n=2, **greedy())
    answer = response.parse()
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(model="auto", prompt=p, **greedy()).choices[0].text for p in prompts]
    assert [c.text for c in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    experts = [routed.route(p).name for p in prompts]
    assert response.headers["x-gradientspace-expert"].split(",") == experts
    hot = {"model": "base", "prompt": "one", "max_tokens": 8, "temperature": 2.0, "n": 3, "seed": 5}
    first, again = (client.completions.create(**hot) for _ in range(2))
    texts = [c.text for c in first.choices]
    assert texts == [c.text for c in again.choices]
    assert len(set(texts)) == 3


def test_stop_texts_token_prompts_and_no_tokens(client, routed: RoutedModel) -> None:  # noqa: F811
    free = client.completions.create(model="base", prompt="one two", **greedy()).choices[0].text
    stopped = client.completions.create(model="base", prompt="one two", stop=[free[3:5]], **greedy()).choices[0]
    assert stopped.text == free[: free.index(free[3:5])]
    assert stopped.finish_reason == "stop"
    ids = routed.tokenizer("one two")["input_ids"]
    assert client.completions.create(model="base", prompt=ids, **greedy()).choices[0].text == free
    empty = client.completions.create(model="base", prompt="one two", **greedy(max_tokens=0))
    assert (empty.choices[0].text, empty.usage.completion_tokens) == ("", 0)


def test_log_probabilities_of_prompt_and_answer_in_both_forms(client) -> None:
    echoed = client.completions.create(model="base", prompt="one two", echo=True, logprobs=2, **greedy(max_tokens=2))
    choice = echoed.choices[0]
    n = echoed.usage.prompt_tokens + 2
    assert choice.text.startswith("one two")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == n
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[-1] == len(choice.text) - len(choice.logprobs.tokens[-1])
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(max(choice.logprobs.top_logprobs[-1].values()))
    chat = client.chat.completions.create(model="base", messages=CHAT, logprobs=True, top_logprobs=3, **greedy())
    tokens = chat.choices[0].logprobs.content
    assert len(tokens) == chat.usage.completion_tokens
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in tokens)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.role"),
        ({"messages": CHAT, "temperature": -1}, "temperature"),
        ({"messages": CHAT, "max_tokens": 10_000}, "at most 4096"),
        ({"messages": CHAT, "max_tokens": 300}, "over the model's context of 256"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools is not supported"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "x"}]}, "last message is the assistant's"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text parts"),
        ({}, "messages"),
        ([], "body"),
    ],
)
def test_wrong_requests_are_named(url, body, message) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_errors_as_the_client_knows_them(client, url) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'expert_7' does not exist; there are auto, expert_0"):
        client.chat.completions.create(model="expert_7", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="at least one token"):
        client.completions.create(model="base", prompt=[10_000])
    for body in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        response = httpx.post(f"{url}/v1/completions", content=body)
        assert (response.status_code, response.json()["error"]["message"]) == (
            400,
            "the body is not JSON in valid Unicode",
        )
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["code"] is None
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def test_a_conversation_keeps_its_expert(client, routed: RoutedModel) -> None:  # noqa: F811
    first = client.chat.completions.with_raw_response.create(model="auto", messages=CHAT, **greedy(max_tokens=1))
    expert = first.headers["x-gradientspace-expert"]
    other = "expert_0" if expert == "expert_1" else "expert_1"
    longer = [*CHAT, {"role": "assistant", "content": "cat"}]
    longer += [{"role": "user", "content": "Count the letters of: sun moon sea bird"}] * 3
    later = client.chat.completions.with_raw_response.create(model="auto", messages=longer, **greedy(max_tokens=1))
    assert later.headers["x-gradientspace-expert"] == expert
    sticky = client.chat.completions.with_raw_response.create(
        model="auto", messages=CHAT, extra_headers={"x-gradientspace-expert": other}, **greedy(max_tokens=1)
    )
    assert sticky.headers["x-gradientspace-expert"] == other
    assert sticky.headers["x-gradientspace-reason"] == "sticky"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="auto", messages=CHAT, extra_headers={"x-gradientspace-expert": "nobody"})


def test_the_decision_alone(url, routed: RoutedModel) -> None:  # noqa: F811
    decision = routed.route(PROMPT)
    for body in ({"prompt": PROMPT}, {"messages": CHAT}):
        found = httpx.post(f"{url}/v1/route", json=body).json()
        assert found["expert"] == decision.name
        assert found["probability"] == pytest.approx(decision.probability, abs=1e-3)
        assert found["reason"] == "routed"
    for body in ({}, {"prompt": ""}, [], {"messages": [1]}):
        assert httpx.post(f"{url}/v1/route", json=body).status_code == 400


def test_health_and_metrics(url, client) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}

    def metric(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    name = 'gradientspace_requests_total{model="expert_1",reason="named",status="200"}'
    before, written = metric(name), metric('gradientspace_tokens_total{kind="completion",model="expert_1"}')
    options = greedy(model="expert_1", messages=CHAT, extra_body={"ignore_eos": True})
    client.chat.completions.create(**options)
    list(client.chat.completions.create(stream=True, **options))
    assert metric(name) == before + 2
    assert metric('gradientspace_tokens_total{kind="completion",model="expert_1"}') == written + 12
    assert metric('gradientspace_first_token_seconds_count{model="expert_1"}') >= 1
    assert metric("gradientspace_running") == metric("gradientspace_queue") == 0
    assert metric("gradientspace_routing_probability_count") >= 0


def test_text_that_json_can_hold_but_unicode_cannot(url) -> None:
    for path, field in (("completions", {"prompt": "half \ud83d"}), ("route", {"prompt": "half \ud83d"})):
        response = httpx.post(f"{url}/v1/{path}", content=json.dumps({"model": "auto", **field}))
        assert response.status_code == 400
        assert "valid Unicode" in response.json()["error"]["message"]
    body = json.dumps({"model": "base", "prompt": "a whole one \U0001f600", "max_tokens": 1})
    assert httpx.post(f"{url}/v1/completions", content=body).status_code == 200
