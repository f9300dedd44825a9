"""What keeps a server alive: keys, limits, clients that go away, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serving_fixtures import listening, micro_app, micro_backend

from gradientspace.errors import ConfigError
from gradientspace.run_folder import Run
from gradientspace.serving.app import Limits
from gradientspace.serving.backend import Reply
from gradientspace.serving.command import api_keys
from gradientspace.serving.protocol import chunk, delta

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn|websockets")]

BODY = {"model": "expert_0", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 4}


class SlowBackend:
    """Answers when it is told to; counts what runs and what was stopped."""

    names = ("expert_0", "expert_1", "base")

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = self.stopped = self.closed = 0

    async def start(self) -> None: ...

    async def close(self) -> None:
        self.closed += 1

    def waiting(self) -> int:
        return self.running

    async def answer(self, call) -> Reply:
        if call.body.stream:
            return Reply(chunks=self._chunks())
        await self._wait()
        return Reply(body={"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})

    async def _wait(self) -> None:
        self.running += 1
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        except BaseException:
            self.stopped += 1
            raise
        finally:
            self.running -= 1

    async def _chunks(self):
        yield chunk("chat", "x", "expert_0", [delta("chat", 0, "first", None, None)])
        await self._wait()
        yield chunk("chat", "x", "expert_0", [], usage={"prompt_tokens": 1, "completion_tokens": 2})


@contextlib.contextmanager
def slow_server(run: Run, **options):
    backend = SlowBackend()
    with listening(micro_app(run, backend, **options)) as url:
        yield url, backend
    assert backend.closed == 1


def eventually(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metric(url: str, line: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(line)), 0.0)


def test_keys_are_asked_of_everything_but_health(finished_run: Run) -> None:
    with slow_server(finished_run, keys=["one-key", "other-key"]) as (url, backend):
        backend.go.set()
        for path in ("/metrics", "/v1/models", "/nothing"):
            assert httpx.get(url + path).status_code == 401
        for wrong in (None, "Bearer one-ke", "one-key", "Bearer", "Basic one-key"):
            response = httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=wrong and {"authorization": wrong})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "x-gradientspace-expert" not in response.headers
        for key in ("one-key", "other-key"):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers).status_code == 200
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200


def test_where_keys_come_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRADIENTSPACE_API_KEYS", "a, b,")
    assert api_keys(None) == ["a", "b"]
    (tmp_path / "keys").write_text("c\n\n d \n")
    assert api_keys(tmp_path / "keys") == ["a", "b", "c", "d"]
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing"):
        with pytest.raises(ConfigError, match=name):
            api_keys(tmp_path / name)


def test_a_body_over_the_limit_is_refused_however_it_comes(finished_run: Run) -> None:
    with slow_server(finished_run, limits=Limits(max_body=1000)) as (url, _):
        for content in (b"x" * 1001, iter([b"x" * 400] * 3)):
            response = httpx.post(f"{url}/v1/chat/completions", content=content)
            assert response.status_code == 413
            assert "over the limit of 1000 bytes" in response.json()["error"]["message"]


def test_too_many_requests_at_once(finished_run: Run) -> None:
    with slow_server(finished_run, limits=Limits(max_requests=2)) as (url, backend), httpx.Client() as client:
        statuses = []
        send = lambda: statuses.append(client.post(f"{url}/v1/chat/completions", json=BODY).status_code)  # noqa: E731
        threads = [threading.Thread(target=send) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: backend.running == 2)
        assert metric(url, "gradientspace_running") == metric(url, "gradientspace_queue") == 2
        response = client.post(f"{url}/v1/chat/completions", json=BODY)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert client.get(f"{url}/ready").status_code == 503
        backend.go.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        assert client.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
        assert metric(url, 'gradientspace_rejected_total{status="429"}') == 1


def test_time_runs_out(finished_run: Run) -> None:
    with slow_server(finished_run, limits=Limits(seconds=0.2)) as (url, backend):
        response = httpx.post(f"{url}/v1/chat/completions", json=BODY)
        assert response.status_code == 504
        stream = httpx.post(f"{url}/v1/chat/completions", json={**BODY, "stream": True})
        assert stream.status_code == 200  # it had begun
        events = [line for line in stream.text.splitlines() if line]
        assert "the answer took over 0.2 s" in events[-2]
        assert events[-1] == "data: [DONE]"
        eventually(lambda: backend.stopped == 2 and backend.running == 0)
        assert metric(url, 'gradientspace_requests_total{model="expert_0",reason="named",status="504"}') == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_engine(finished_run: Run, stream: bool) -> None:
    with slow_server(finished_run) as (url, backend):
        with httpx.Client() as client:
            request = client.build_request("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": stream})
            if stream:
                response = client.send(request, stream=True)
                assert next(response.iter_lines())
                response.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.send(client.build_request(**_parts(request), timeout=0.3))
        eventually(lambda: backend.stopped == 1)
        eventually(lambda: metric(url, "gradientspace_running") == 0)
        line = 'gradientspace_requests_total{model="expert_0",reason="named",status="499"}'
        assert metric(url, line) == 1


def _parts(request: httpx.Request) -> dict:
    return {"method": "POST", "url": request.url, "content": request.content, "headers": {"accept": "*/*"}}


def test_a_cancelled_row_leaves_the_real_batch(finished_run: Run) -> None:
    backend = micro_backend(finished_run)
    body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with listening(micro_app(finished_run, backend)) as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines())
        start = time.monotonic()
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
        eventually(lambda: metric(url, "gradientspace_running") == 0)
        assert time.monotonic() - start < 5
        written = metric(url, 'gradientspace_tokens_total{kind="completion",model="expert_0"}')
        assert written < 200


def test_what_runs_is_finished_before_the_end(finished_run: Run) -> None:
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=10).status_code)

    with slow_server(finished_run) as (url, backend):
        thread = threading.Thread(target=ask)
        thread.start()
        eventually(lambda: backend.running == 1)
        threading.Timer(0.3, backend.go.set).start()
    thread.join()
    assert answers == [200]


def test_a_batch_that_fails_fails_alone(finished_run: Run, monkeypatch) -> None:
    backend = micro_backend(finished_run)
    with listening(micro_app(finished_run, backend)) as url:
        with monkeypatch.context() as patched:
            patched.setattr("gradientspace.serving.local.generate", _out_of_memory)
            response = httpx.post(f"{url}/v1/chat/completions", json=BODY)
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "internal error: MemoryError"
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
        assert metric(url, "gradientspace_running") == 0


def _out_of_memory(*_):
    raise MemoryError


def test_the_command_serves_and_ends_in_order(finished_run: Run) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gradientspace", "serve", str(finished_run.path), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    said = next(line for line in process.stderr if line.startswith("serving"))
    assert f"auto, expert_0, expert_1, shared, base on http://127.0.0.1:{port}/v1" in said
    assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY).status_code == 200
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 0, rest
