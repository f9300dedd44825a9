"""Requests that no client should send, straight into the app: an answer, or an error as the client knows errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from harness import Outcome, case, check_line, search
from hypothesis import given
from hypothesis import strategies as st
from serving_fixtures import micro_app, micro_backend

from gradientspace.run_folder import Run
from gradientspace.serving.app import Limits
from gradientspace.serving.openapi import OPENAPI_PATH, document

pytestmark = [pytest.mark.e2e, pytest.mark.fuzz, pytest.mark.usefixtures("in_tmp_path")]

LIMITS = Limits(max_body=20_000, max_tokens=3, seconds=15)
REFUSED = {400, 401, 404, 405, 413, 422, 429}
Headers = list[tuple[bytes, bytes]]


class Asgi:
    """The app on a loop of its own, asked without a socket, so that any bytes can be sent."""

    def __init__(self, run: Run) -> None:
        self.app = micro_app(run, micro_backend(run, default_tokens=2, wait=0), limits=LIMITS)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.app.state.server.start())

    def close(self) -> None:
        self.loop.run_until_complete(self.app.state.server.stop())
        self.loop.close()

    def ask(self, method: str, path: bytes, headers: Headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return self.loop.run_until_complete(self._ask(method, path, headers, body))

    async def _ask(self, method: str, path: bytes, headers: Headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
        came = iter([{"type": "http.request", "body": body, "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            for message in came:
                return message
            return await asyncio.Event().wait()  # the client stays

        async def send(message: Any) -> None:
            sent.append(message)

        bare, _, query = path.partition(b"?")
        await self.app(
            {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": method,
                "scheme": "http",
                "path": unquote(bare.decode("latin-1")),
                "raw_path": bare,
                "query_string": query,
                "root_path": "",
                "headers": headers,
                "client": ("127.0.0.1", 1),
                "server": ("testserver", 80),
            },
            receive,
            send,
        )
        head = {k.decode("latin-1"): v.decode("latin-1") for k, v in sent[0]["headers"]}
        return sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:])


@pytest.fixture(scope="module")
def asgi(finished_run: Run) -> Iterator[Asgi]:
    asgi = Asgi(finished_run)
    yield asgi
    assert asgi.app.state.server.running == 0, "a request kept its place"
    asgi.close()


def judge(outcome: Outcome, status: int, headers: dict[str, str], body: bytes) -> None:
    """What every answer looks like."""
    if status == 200:
        if headers["content-type"].startswith("text/event-stream"):
            judge_stream(body)
        elif headers["content-type"].startswith("application/json"):
            json.loads(body)
        return
    assert status in REFUSED, (status, body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    outcome.refuse(error["message"])


def judge_stream(body: bytes) -> None:
    *events, done, empty = body.decode().split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    for event in events:
        data = json.loads(event.removeprefix("data: "))
        assert "error" not in data, data


TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "",
            " ",
            "one two",
            "a\n\nb",
            "\0",
            "\ud800",
            "\U0001f600" * 5,
            "<s></s><pad>",
            "{{ x }}",
            "x" * 3000,
            "base",
            "auto",
            "expert_0",
            "../../x",
            "</s>",
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**30]),
    st.floats(),
    st.sampled_from([1e-320, 1e-45, 5e-324, 1e308, 1e-7]),
)
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
)
TOKENS = st.lists(st.integers(-1, 405) | st.sampled_from([2**31, 2**32, 2**64]), max_size=5)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user"] * 4 + ["system", "assistant", "developer", "tool", "wizard"]),
        "content": st.one_of(
            TEXT, TEXT, ANY, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": ANY}), max_size=3)
        ),
    },
    optional={"name": ANY},
)


def mostly(good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What is answered as a rule: else every request would be refused for one of its many fields."""
    return st.integers(0, 7).flatmap(lambda n: odd if n == 0 else good)


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": mostly(st.sampled_from(["auto", "base", "expert_0", "expert_1"]), TEXT),
    "temperature": mostly(st.floats(0, 2), NUMBERS),
    "top_p": mostly(st.floats(0.001, 1), NUMBERS),
    "top_k": mostly(st.integers(-1, 500), NUMBERS),
    "n": mostly(st.integers(1, 3), NUMBERS),
    "seed": mostly(st.integers(), NUMBERS),
    "stop": mostly(TEXT | st.lists(TEXT, max_size=3), ANY),
    "stream": mostly(st.booleans(), ANY),
    "stream_options": mostly(st.fixed_dictionaries({"include_usage": st.booleans()}), ANY),
    "max_tokens": mostly(st.integers(0, 3), NUMBERS),
    "logprobs": mostly(st.booleans() | st.integers(0, 5), NUMBERS),
    "top_logprobs": mostly(st.integers(0, 5), NUMBERS),
    "echo": mostly(st.booleans(), ANY),
    "ignore_eos": mostly(st.booleans(), ANY),
    "max_completion_tokens": mostly(st.integers(0, 3), NUMBERS),
    "tools": mostly(st.just([]), ANY),
    "logit_bias": mostly(st.just({}), ANY),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A path and a body."""
    path = draw(st.sampled_from([b"/v1/chat/completions", b"/v1/completions", b"/v1/route"]))
    if draw(st.integers(0, 9)) == 0:
        return path, draw(
            st.binary(max_size=60)
            | st.sampled_from(
                [
                    b"[" * 9000,
                    b'{"a":' * 3000,
                    b"9" * 5000,
                    b"\xed\xa0\x80",
                    b'{"prompt": "\xed\xa0\x80"}',
                    b'{"prompt": "\\ud800"}',
                    b"\xff\xfe{\0}\0",
                    b"\xef\xbb\xbf{}",
                ]
            )
        )
    if path == b"/v1/chat/completions":
        body = {"messages": draw(mostly(st.lists(MESSAGE, min_size=1, max_size=3), ANY))}
    else:
        several = st.lists(TEXT, min_size=1, max_size=3) | TOKENS | st.lists(TOKENS, max_size=3)
        body = {"prompt": draw(mostly(TEXT | several, ANY))}
    body["model"] = draw(FIELDS["model"])
    for name in draw(st.lists(st.sampled_from(list(FIELDS)), max_size=4)):
        body[name] = draw(FIELDS[name])
    return path, json.dumps(body).encode()


HEADER_VALUE = st.binary(max_size=30) | st.sampled_from([b"expert_0", b"base", b"9" * 5000, b"-1", b"1e3", b"Bearer x"])
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"x-gradientspace-expert",
                b"content-length",
                b"authorization",
                b"content-type",
                b"x-request-id",
                b"traceparent",
                b"transfer-encoding",
                b"accept",
                b"host",
                b"cookie",
                b"origin",
                b"x-forwarded-for",
            ]
        ),
        HEADER_VALUE,
    ),
    max_size=2,
)


@search("server-bodies", 0.8)
@given(sent=bodies(), headers=st.just([]) | HEADERS)
def test_any_body_is_answered_or_refused(
    asgi: Asgi, tmp_path: Any, sent: tuple[bytes, bytes], headers: Headers
) -> None:
    with case("server-bodies", tmp_path) as outcome:
        judge(outcome, *asgi.ask("POST", sent[0], headers, sent[1]))


PATHS = st.sampled_from(
    [b"/health", b"/ready", b"/metrics", b"/v1/models", b"/v1/route", b"/openapi.json", b"/docs"]
) | st.text(max_size=20).map(lambda name: b"/v1/models/" + name.encode("utf-8", "replace"))


@search("server-bodies", 0.2)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "TRACE", "BREW"]),
    path=PATHS
    | st.sampled_from([b"/../../etc/passwd", b"//", b"/v1/models/..%2f..%2fx", b"/v1/models/%00", b"/?x=%ff"]),
    headers=HEADERS,
)
def test_any_path_and_header_is_answered_or_refused(
    asgi: Asgi, tmp_path: Any, method: str, path: bytes, headers: Headers
) -> None:
    with case("server-bodies", tmp_path) as outcome:
        judge(outcome, *asgi.ask(method, path, headers, b""))


FOUND = [
    ("/v1/completions", b'{"prompt": []}'),
    ("/v1/completions", b'{"prompt": [99999999999999999999]}'),
    ("/v1/completions", b'{"prompt": [-1]}'),
    ("/v1/completions", b'{"prompt": [[]]}'),
    ("/v1/completions", b'{"prompt": "a", "seed": 99999999999999999999}'),
    ("/v1/completions", b'{"prompt": "a", "top_k": 99999999999999999999}'),
    ("/v1/completions", b'{"prompt": [' + b"[5]," * 999 + b'[5]], "n": 2}'),
    ("/v1/completions", b'{"prompt": "\xed\xa0\x80"}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}'),
    ("/v1/route", b"\xff\xfe{\0}\0"),
]
"""Bodies that were once a server error, an answer to nobody or a million rows."""


@pytest.mark.parametrize(("path", "body"), FOUND)
def test_what_was_found_is_refused(asgi: Asgi, path: str, body: bytes) -> None:
    status, _, answer = asgi.ask("POST", path.encode(), [], body)
    assert status == 400, answer
    check_line(json.loads(answer)["error"]["message"])


@pytest.mark.parametrize("name", ["x" * 3000, "a\nb", "\x1b[31mred", "\u202egnp"])
def test_an_error_that_quotes_the_client_is_one_line(asgi: Asgi, name: str) -> None:
    status, _, answer = asgi.ask("POST", b"/v1/completions", [], json.dumps({"prompt": "a", "model": name}).encode())
    assert status == 404
    check_line(json.loads(answer)["error"]["message"])


def test_a_length_of_thousands_of_digits_is_too_large(asgi: Asgi) -> None:
    assert asgi.ask("POST", b"/v1/route", [(b"content-length", b"9" * 5000)], b"{}")[0] == 413


def test_a_wrong_method_is_told_the_right_one(asgi: Asgi) -> None:
    status, headers, _ = asgi.ask("GET", b"/v1/route", [], b"")
    assert (status, headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("options", ['"temperature": 1e-320', '"temperature": 1e-45', '"top_p": 5e-324'])
def test_the_smallest_numbers_are_answered(asgi: Asgi, options: str) -> None:
    body = f'{{"prompt": "a", "model": "base", "max_tokens": 2, {options}}}'.encode()
    assert asgi.ask("POST", b"/v1/completions", [], body)[0] == 200


def test_the_document_is_served_and_names_every_route(asgi: Asgi) -> None:
    status, _, body = asgi.ask("GET", OPENAPI_PATH.encode(), [], b"")
    assert (status, json.loads(body)) == (200, document())
    served = {route.path for route in asgi.app.routes} - {OPENAPI_PATH}
    assert served == set(document()["paths"])


def operations() -> Iterator[Any]:
    import schemathesis

    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url="http://testserver")
    return (found.ok() for found in schema.get_all_operations())


@pytest.mark.parametrize("operation", list(operations()), ids=lambda operation: operation.label)
def test_schemathesis_finds_what_the_document_promises(asgi: Asgi, tmp_path: Any, operation: Any) -> None:
    """Statuses, content types and schemas are the document's, and nothing is a server error."""
    import requests
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    takes_body = operation.method.upper() == "POST"
    modes = list(schemathesis.GenerationMode) if takes_body else [schemathesis.GenerationMode.POSITIVE]

    @search("server-schema", 0.3 if takes_body else 0.02)
    @given(generated=st.one_of(*(operation.as_strategy(mode) for mode in modes)))
    def run(generated: Any) -> None:
        options = generated.as_transport_kwargs(base_url="http://testserver")
        names = ("method", "url", "headers", "params", "data", "json", "cookies", "files")
        request = requests.Request(**{name: options[name] for name in names if name in options}).prepare()
        body = request.body or b""
        headers = [(k.lower().encode(), str(v).encode("latin-1", "replace")) for k, v in request.headers.items()]
        with case("server-schema", tmp_path) as outcome:
            status, head, content = asgi.ask(
                request.method or "",
                (request.path_url or "/").encode(),
                headers,
                body if isinstance(body, bytes) else str(body).encode("utf-8", "surrogatepass"),
            )
            judge(outcome, status, head, content)
        sent = httpx.Request(request.method or "", "http://testserver" + (request.path_url or "/"))
        answer = httpx.Response(status, headers=head, content=content, request=sent)
        answer.elapsed = _no_time()
        generated.validate_response(answer, checks=checks)

    run()


def _no_time() -> Any:
    import datetime

    return datetime.timedelta(0)
