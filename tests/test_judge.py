"""The judge of two methods' answers, over a local endpoint that prefers what we tell it to."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gradientspace.errors import InputError


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("judge")


@pytest.fixture
def endpoint() -> Iterator[Callable[[Callable[[str], str]], str]]:
    """Start a server whose judgement is a function of the question; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(decide: Callable[[str], str]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = {"choices": [{"message": {"content": decide(body["messages"][0]["content"])}}]}
                data = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ROWS = [("p", "good", "bad"), ("p", "bad", "good"), ("p", "bad", "bad")]


def test_the_better_answer_wins_wherever_it_stands(judge, endpoint) -> None:
    def decide(question: str) -> str:
        first, second = question.split("FIRST:")[1].split("SECOND:")
        if first.strip() == second.strip():
            return "It is a tie."
        return "FIRST" if "good" in first else "second."

    found = judge.compare(judge.Judge(endpoint(decide), "m"), ROWS)
    assert (found["wins"], found["losses"], found["ties"], found["order_decides"]) == (1, 1, 1, 0)
    assert found["score"]["mean"] == 0


def test_a_judge_that_likes_the_first_place_decides_nothing(judge, endpoint) -> None:
    found = judge.compare(judge.Judge(endpoint(lambda question: "FIRST"), "m"), ROWS)
    assert (found["ties"], found["order_decides"]) == (3, 3)


def test_a_judge_that_is_not_there_is_one_clear_line(judge) -> None:
    with pytest.raises(InputError, match="does not answer"):
        judge.Judge("http://127.0.0.1:9/v1", "m").prefers("p", "a", "b")
