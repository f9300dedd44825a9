"""A server on a real socket, over the micro run, for the tests of serving."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from gradientspace.inference import RoutedModel, adapters_of, named_folders, template_of
from gradientspace.models import load_base, load_tokenizer
from gradientspace.router import Router
from gradientspace.run_folder import Run


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    """`app` served by uvicorn in a thread; gives its URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def micro_backend(run: Run, **options):
    """The built-in backend over a run, with its references, and the run's router."""
    from gradientspace.serving.local import LocalBackend
    from gradientspace.serving.parity import canaries, plain_logits

    tokenizer, base = load_tokenizer(run.config.model), load_base(run.config.model)
    experts, shared = adapters_of(run)
    expected = plain_logits(base, named_folders(experts, shared), torch.tensor(canaries(tokenizer)))
    router = Router.load(run.path / "router")
    model = RoutedModel(base, tokenizer, experts, router, template_of(run, tokenizer), shared)
    return LocalBackend(model, expected, **options)


def micro_app(run: Run, backend=None, **options):
    from gradientspace.serving.app import create_app

    backend = backend or micro_backend(run)
    router = Router.load(run.path / "router")
    return create_app(backend, router, load_tokenizer(run.config.model).decode, **options)


@pytest.fixture(scope="session")
def routed(finished_run: Run) -> RoutedModel:
    """The reference: the same run without a server."""
    return RoutedModel.from_run(finished_run.path)
