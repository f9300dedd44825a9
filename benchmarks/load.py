"""A server under load: 64 streaming clients for a minute, with cancels, bad keys, oversize and malformed bodies.

    python benchmarks/load.py runs/demo --json benchmarks/results/load.json

Starts `gradientspace serve RUN` as a process of its own and checks every answer against `RoutedModel` on the same
prompt and expert: a wrong expert, a lost or a mixed-up answer is an error, and so are more accepted requests than
`--max-requests` allows; the exit code is then 1. A 429 is the bounded queue at work: it is counted by itself, and the
client waits a moment and asks again. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
from machine import describe

from gradientspace.inference import RoutedModel
from gradientspace.run_folder import Run

KEY = "load-test-key"
MAX_BODY = 20_000
MAX_TOKENS = 24
SHARES = {"answer": 0.84, "cancel": 0.06, "bad key": 0.03, "oversize": 0.02, "malformed": 0.03, "unknown model": 0.02}
EXPECTED = {"bad key": 401, "oversize": 413, "malformed": 400, "unknown model": 404}
BUSY = 429
PAUSE = 0.1
"""Seconds a client waits after a 429."""


@dataclass(frozen=True)
class Question:
    model: str
    prompt: str
    expert: str
    """Who must answer."""
    answer: str


@dataclass
class Record:
    counts: collections.Counter = field(default_factory=collections.Counter)
    refused: int = 0
    """Answers of 429 that were in order."""
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    tokens: int = 0


def questions(run: Run, n: int) -> list[Question]:
    """Prompts of the run's evaluation, half of them routed and half for a named model, with their answers."""
    model = RoutedModel.from_run(run.path)
    rows = pq.read_table(run.path / "evaluation/samples.parquet")["prompt"].to_pylist()[:n]
    routed = [model.route(prompt).name for prompt in rows]
    asked = ["auto" if i % 2 else model.names[i // 2 % len(model.names)] for i in range(len(rows))]
    experts = [routed[i] if name == "auto" else name for i, name in enumerate(asked)]
    answers = [
        model.generate(prompt, expert=model.number(expert), max_new_tokens=MAX_TOKENS)
        for prompt, expert in zip(rows, experts, strict=True)
    ]
    return [Question(*row) for row in zip(asked, rows, experts, answers, strict=True)]


# ------------------------------------------------------------------------------- clients


async def client(url: str, pool: list[Question], until: float, seed: int, record: Record) -> None:
    generator = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=60, headers={"authorization": f"Bearer {KEY}"}) as http:
        while time.monotonic() < until:
            kind = generator.choices(list(SHARES), list(SHARES.values()))[0]
            record.counts[kind] += 1
            try:
                if kind in EXPECTED:
                    await misbehave(http, kind, record)
                else:
                    await ask(http, generator.choice(pool), kind == "cancel", record)
            except httpx.HTTPError as error:
                record.errors.append(f"{kind}: {type(error).__name__} {error}")


async def ask(http: httpx.AsyncClient, question: Question, cancel: bool, record: Record) -> None:
    body = {
        "model": question.model, "messages": [{"role": "user", "content": question.prompt}], "temperature": 0,
        "max_tokens": MAX_TOKENS, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    start, text, done = time.monotonic(), "", False
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == BUSY:
            await response.aread()
            await be_refused(response, record)
            return
        if response.status_code != 200:
            record.errors.append(f"answer: status {response.status_code}")
            return
        if response.headers["x-gradientspace-expert"] != question.expert:
            record.errors.append(f"wrong expert: {response.headers['x-gradientspace-expert']}, not {question.expert}")
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and not text:
                    record.first_token.append(time.monotonic() - start)
                text += piece
            record.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
            if cancel and text:
                return
    record.seconds.append(time.monotonic() - start)
    if not done:
        record.errors.append("lost: a stream without its end")
    elif text.strip() != question.answer:
        record.errors.append(f"mixed up: {text.strip()!r} from {question.expert}, not {question.answer!r}")


async def be_refused(response: httpx.Response, record: Record) -> None:
    """A refusal is in order where it says what is the matter."""
    if "message" in response.json()["error"]:
        record.refused += 1
    else:
        record.errors.append(f"a 429 that says nothing: {response.text}")
    await asyncio.sleep(PAUSE)


async def misbehave(http: httpx.AsyncClient, kind: str, record: Record) -> None:
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    options: dict[str, Any] = {"json": body}
    if kind == "bad key":
        options["headers"] = {"authorization": "Bearer wrong"}
    elif kind == "oversize":
        body["messages"][0]["content"] = "x" * (MAX_BODY + 1)
    elif kind == "malformed":
        options = {"content": random.choice([b"{", b"[]", b"\xff", b'{"messages": 3}'])}
    else:
        body["model"] = "expert_999"
    response = await http.post("/v1/chat/completions", **options)
    if response.status_code != EXPECTED[kind] or "message" not in response.json()["error"]:
        record.errors.append(f"{kind}: status {response.status_code}, not {EXPECTED[kind]}")


@dataclass(frozen=True)
class Sample:
    megabytes: float
    """Resident memory of the server."""
    running: float
    """Requests accepted and not finished."""
    waiting: float
    """Requests in the engine's queue."""


async def watch(url: str, process: subprocess.Popen, until: float) -> list[Sample]:
    """The server twice a second."""
    server, samples = psutil.Process(process.pid), []
    async with httpx.AsyncClient(base_url=url, timeout=60, headers={"authorization": f"Bearer {KEY}"}) as http:
        while time.monotonic() < until:
            lines = (await http.get("/metrics")).text.splitlines()
            gauges = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            running, waiting = (float(gauges[f"gradientspace_{name}"]) for name in ("running", "queue"))
            samples.append(Sample(server.memory_info().rss / 1e6, running, waiting))
            await asyncio.sleep(0.5)
    return samples


async def load(url: str, process: subprocess.Popen, pool: list[Question], clients: int, seconds: float) -> Any:
    record, until = Record(), time.monotonic() + seconds
    work = [client(url, pool, until, seed, record) for seed in range(clients)]
    *_, samples = await asyncio.gather(*work, watch(url, process, until))
    return record, samples


# -------------------------------------------------------------------------------- server


def serve(run: Path, max_requests: int, folder: Path) -> tuple[str, subprocess.Popen]:
    keys = folder / "keys"
    keys.write_text(KEY + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gradientspace", "serve", str(run), "--port", str(port), "--api-keys", str(keys)]
    command += ["--max-body", str(MAX_BODY), "--max-requests", str(max_requests)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return url, process
        except httpx.TransportError:
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit("the server did not start")
    raise SystemExit("the server is not ready after two minutes")


def summary(record: Record, samples: list[Sample], clients: int, limit: int, seconds: float) -> dict[str, Any]:
    memory = np.array([sample.megabytes for sample in samples])
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    running = max(sample.running for sample in samples)
    if running > limit:
        record.errors.append(f"{running:.0f} requests accepted at once, the limit is {limit}")
    return {
        "clients": clients,
        "max_requests": limit,
        "seconds": seconds,
        "requests": dict(record.counts),
        "whole_answers": len(record.seconds),
        "refused_429": record.refused,
        "errors": record.errors[:20],
        "n_errors": len(record.errors),
        "tokens_per_second": record.tokens / seconds,
        "seconds_per_answer": {name: float(np.quantile(record.seconds, q)) for name, q in quantiles.items()},
        "seconds_to_first_token": {name: float(np.quantile(record.first_token, q)) for name, q in quantiles.items()},
        "memory_mb_by_third": [float(third.mean()) for third in np.array_split(memory, 3)],
        "memory_mb_peak": float(memory.max()),
        "running_max": running,
        "waiting_max": max(sample.waiting for sample in samples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-requests", type=int, help="the server's limit; default: as many as there are clients")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="8 clients for 5 seconds")
    options = parser.parse_args()
    clients, seconds = (8, 5.0) if options.quick else (options.clients, options.seconds)
    limit = options.max_requests or clients
    pool = questions(Run.open(options.run), 20 if options.quick else 120)
    with tempfile.TemporaryDirectory() as folder:
        url, process = serve(options.run, limit, Path(folder))
        try:
            record, samples = asyncio.run(load(url, process, pool, clients, seconds))
        finally:
            process.terminate()
            code = process.wait(60)
    results = {"machine": describe("fastapi", "uvicorn"), **summary(record, samples, clients, limit, seconds)}
    results["exit_code_of_the_server"] = code
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if record.errors else 0


if __name__ == "__main__":
    sys.exit(main())
