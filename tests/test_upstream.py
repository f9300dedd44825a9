"""The proxy in front of an engine. The engine of these tests is our own server, honest or lying."""

from __future__ import annotations

import contextlib
import json

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serving_fixtures import listening, micro_app, micro_backend, routed  # noqa: F401

from gradientspace.models import load_tokenizer
from gradientspace.run_folder import Run
from gradientspace.serving.parity import NATS, ParityError, canaries, recorded_fingerprints
from gradientspace.serving.upstream import UpstreamBackend, UpstreamError

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn|websockets")]

CHAT = [{"role": "user", "content": "Repeat these words: cat dog sky"}]
NAMES = ["expert_0", "expert_1", "base"]


@pytest.fixture(scope="module")
def engine(finished_run: Run):
    """An engine that holds the adapters."""
    with listening(micro_app(finished_run, micro_backend(finished_run), keys=["engine-key"])) as url:
        yield url


def proxy_to(url: str, run: Run, **options) -> UpstreamBackend:
    tokenizer = load_tokenizer(run.config.model)
    options = {"tolerance": NATS, "api_key": "engine-key"} | options
    return UpstreamBackend(url, NAMES, canaries(tokenizer), recorded_fingerprints(run, tokenizer, False), **options)


@pytest.fixture(scope="module")
def proxy(finished_run: Run, engine: str):
    with listening(micro_app(finished_run, proxy_to(f"{engine}/v1/", finished_run))) as url:
        yield url


@pytest.fixture
def clients(engine: str, proxy: str):
    with (
        openai.OpenAI(base_url=f"{proxy}/v1", api_key="none", max_retries=0) as through,
        openai.OpenAI(base_url=f"{engine}/v1", api_key="engine-key", max_retries=0) as direct,
    ):
        yield through, direct


def test_answers_and_streams_are_the_engines_and_name_the_expert(clients, routed) -> None:  # noqa: F811
    through, direct = clients
    options = {"messages": CHAT, "temperature": 0, "max_tokens": 5}
    decision = routed.route(CHAT)
    expected = direct.chat.completions.create(model=decision.name, **options)
    response = through.chat.completions.with_raw_response.create(model="auto", **options)
    assert response.headers["x-gradientspace-expert"] == response.parse().model == decision.name
    assert response.parse().choices == expected.choices
    assert response.parse().usage == expected.usage
    with through.chat.completions.with_streaming_response.create(model="auto", stream=True, **options) as stream:
        assert stream.headers["x-gradientspace-expert"] == decision.name
        events = list(stream.parse())
    text = "".join(c.delta.content or "" for e in events for c in e.choices)
    assert text == expected.choices[0].message.content
    assert {event.model for event in events} == {decision.name}
    assert not any(event.usage for event in events)  # asked of the engine for the metrics, not by the client


def test_prompts_for_several_experts_come_back_in_order(clients) -> None:
    through, direct = clients
    prompts = ["Count the letters of: sun", "Repeat these words: moon sea", "Count the letters of: bird cat"]
    options = {"temperature": 0, "max_tokens": 4, "n": 2}
    response = through.completions.with_raw_response.create(model="auto", prompt=prompts, **options)
    names = response.headers["x-gradientspace-expert"].split(",")
    assert len(set(names)) == 2
    found = response.parse()
    assert [c.index for c in found.choices] == list(range(6))
    for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        expected = direct.completions.create(model=name, prompt=prompt, **options)
        assert [c.text for c in found.choices[2 * i : 2 * i + 2]] == [c.text for c in expected.choices]
    events = list(
        through.completions.create(
            model="auto", prompt=prompts, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    texts = [""] * 6
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in found.choices]
    assert events[-1].usage == found.usage


def test_fields_only_the_engine_knows_and_its_errors_pass_through(clients, proxy: str) -> None:
    through, _ = clients
    with pytest.raises(openai.BadRequestError, match="min_p is not supported"):
        through.chat.completions.create(model="base", messages=CHAT, extra_body={"min_p": 0.1})
    for stream in (False, True):
        body = {"model": "base", "messages": CHAT, "max_tokens": 250, "stream": stream}
        response = httpx.post(f"{proxy}/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert response.headers["x-gradientspace-expert"] == "base"


@contextlib.contextmanager
def fake_engine(handler):
    """An engine that lists our names and answers completions with `handler(body)`."""
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: {"data": [{"id": name} for name in NAMES]})

    async def answer(request: Request):
        return await handler(await request.json())

    app.add_api_route("/v1/completions", answer, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", answer, methods=["POST"], response_model=None)
    with listening(app) as url:
        yield url


async def start(backend: UpstreamBackend) -> None:
    try:
        await backend.start()
    finally:
        await backend.close()


def refuses_to_start(backend: UpstreamBackend, error: type[Exception], message: str) -> None:
    import asyncio

    with pytest.raises(error, match=message):
        asyncio.run(start(backend))


@pytest.mark.parametrize("full_batch_only", [False, True])
def test_an_engine_that_mixes_up_its_adapters_is_refused(finished_run: Run, engine: str, full_batch_only) -> None:
    """As an engine with all its LoRA slots taken does: requests for the base, beside experts', get an expert."""
    running = 0

    async def lie(body):
        nonlocal running
        running += 1
        if body["model"] == "base" and (running > 3 or not full_batch_only):
            body["model"] = "expert_1"
        async with httpx.AsyncClient(headers={"authorization": "Bearer engine-key"}, timeout=60) as client:
            answer = (await client.post(f"{engine}/v1/completions", json=body)).json()
        running -= 1
        return JSONResponse(answer)

    with fake_engine(lie) as url:
        refuses_to_start(proxy_to(url, finished_run), ParityError, "a request for base as expert_1 does")


def test_an_engine_that_is_not_what_it_should_be_is_refused_in_one_line(finished_run: Run, engine: str) -> None:
    refuses_to_start(
        proxy_to(engine, finished_run, upstream_name=lambda name: f"x:{name}"),
        UpstreamError,
        "does not serve x:expert_0",
    )
    refuses_to_start(proxy_to("http://127.0.0.1:9", finished_run), UpstreamError, "does not list its models")
    refuses_to_start(proxy_to(engine, finished_run, api_key="wrong"), UpstreamError, "401")

    async def no_logprobs(_):
        return {"choices": [{"text": "x", "logprobs": None}]}

    with fake_engine(no_logprobs) as url:
        refuses_to_start(proxy_to(url, finished_run), UpstreamError, "cannot be tested for parity")


def test_an_engine_that_breaks_later(finished_run: Run) -> None:
    modes = iter(["status", "text", "cut"])

    async def broken(body):
        mode = next(modes)
        if mode == "status":
            return JSONResponse({"error": {"message": "engine is on fire"}}, 503)
        if mode == "text":
            return StreamingResponse(iter([b"<html>"]), 502)

        async def cut():
            yield b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "a"}}]}).encode() + b"\n\n"
            raise RuntimeError

        return StreamingResponse(cut(), media_type="text/event-stream")

    def proxy() -> contextlib.AbstractContextManager[str]:
        backend = proxy_to(url, finished_run)
        backend.start = nothing
        return listening(micro_app(finished_run, backend))

    async def nothing() -> None: ...

    def ask(to: str, **more) -> httpx.Response:
        return httpx.post(f"{to}/v1/chat/completions", json={"model": "base", "messages": CHAT, **more})

    with fake_engine(broken) as url, proxy() as through:
        response = ask(through)
        assert (response.status_code, response.json()["error"]["message"]) == (503, "engine is on fire")
        assert ask(through).status_code == 502
        events = [line for line in ask(through, stream=True).text.splitlines() if line]
        assert '"content": "a"' in events[0]
        assert "the upstream broke off" in events[1]
        assert events[2] == "data: [DONE]"
    with proxy() as through:
        response = ask(through)
        assert response.status_code == 502
        assert "does not answer" in response.json()["error"]["message"]


def test_fingerprints_are_made_once(finished_run: Run, monkeypatch) -> None:
    tokenizer = load_tokenizer(finished_run.config.model)
    made = recorded_fingerprints(finished_run, tokenizer, False)
    monkeypatch.setattr("gradientspace.models.load_base", None)
    assert recorded_fingerprints(finished_run, tokenizer, False) == made
    assert list(made) == ["base", "expert_0", "expert_1"]
