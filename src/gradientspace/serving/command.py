"""`gradientspace serve RUN`: options, start and stop of the process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradientspace.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from gradientspace.encoder import EncoderDtype
    from gradientspace.router import Router
    from gradientspace.run_folder import Run
    from gradientspace.serving.backend import Backend

KEYS_VARIABLE = "GRADIENTSPACE_API_KEYS"
UPSTREAM_KEY_VARIABLE = "GRADIENTSPACE_UPSTREAM_API_KEY"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a finished run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE",
        help=f"file with one accepted key a line; or the variable {KEYS_VARIABLE}, by commas. Without: everybody",
    )  # fmt: skip
    parser.add_argument(
        "--upstream", metavar="URL",
        help="answer with the engine at this URL, which holds the adapters (vLLM, SGLang), instead of the built-in one",
    )  # fmt: skip
    parser.add_argument(
        "--upstream-name", default="{name}", metavar="FORM",
        help="the engine's name for one of ours, for instance 'base:{name}' for SGLang's adapters",
    )  # fmt: skip
    parser.add_argument("--upstream-base", default="base", metavar="NAME", help="the engine's name for the base")
    parser.add_argument(
        "--parity-tolerance", type=float, metavar="NATS", default=0.05,
        help="mean difference of log-probabilities between the engine and plain PEFT that the self-test allows",
    )  # fmt: skip
    parser.add_argument("--max-batch", type=int, default=32, help="rows of one batch of the built-in engine")
    parser.add_argument("--max-requests", type=int, default=256, help="requests that run or wait; more get 429")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request's body; more gets 413")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest answer a client may ask for")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a request may take; then 504")
    parser.add_argument(
        "--route-every-turn", action="store_true",
        help="route a conversation anew on all of its user turns, instead of keeping the expert of its first",
    )  # fmt: skip
    parser.add_argument(
        "--router-dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="type of the router's encoder; auto: bfloat16 where the processor has instructions for it",
    )  # fmt: skip


def serve(options: argparse.Namespace, _: list[str]) -> None:
    try:
        import uvicorn

        from gradientspace.serving.app import Limits, create_app
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'gradientspace[serve]'") from error
    from gradientspace.progress import say
    from gradientspace.run_folder import Run

    keys = api_keys(options.api_keys)
    run = Run.open(options.run)
    router = load_router(run, options.router_dtype)
    backend, detokenise = (upstream if options.upstream else built_in)(run, router, options)
    app = create_app(
        backend,
        router,
        detokenise,
        keys=keys,
        limits=Limits(options.max_body, options.max_tokens, options.max_requests, options.timeout),
        whole_conversation=options.route_every_turn,
    )
    server = _server(
        uvicorn.Config(
            app, options.host, options.port, lifespan="off", log_level="warning", ws="none",
            timeout_graceful_shutdown=int(options.timeout), server_header=False,
        )
    )  # fmt: skip

    async def life() -> None:
        # Not uvicorn's lifespan: a failed self-test is to be one line and an exit code, not its traceback.
        await app.state.server.start()
        say(f"serving {', '.join(['auto', *backend.names])} on http://{options.host}:{options.port}/v1")
        try:
            await server.serve()
        finally:
            await app.state.server.stop()

    if not keys and options.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"anyone who reaches {options.host} may use this server: give --api-keys FILE")
    asyncio.run(life())


def _server(config: uvicorn.Config) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Stops in order on SIGTERM and Ctrl-C; uvicorn's own would then raise the signal again and skip our end."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            try:
                yield
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

    return Server(config)


def api_keys(path: Path | None) -> list[str]:
    """Keys of the file and of the environment. Raises `ConfigError` for a file that is missing or has none."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"the file of API keys {path} does not exist")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ConfigError(f"the file of API keys {path} has none: one a line")
        keys += lines
    return keys


def load_router(run: Run, dtype: EncoderDtype) -> Router:
    from gradientspace.encoder import Encoder
    from gradientspace.router import Router, saved_encoder

    folder = run.require("router", f"router {run.path}")
    name, max_length = saved_encoder(folder)
    return Router.load(folder, Encoder(name, max_length=max_length, dtype=dtype))


def built_in(run: Run, router: Router, options: argparse.Namespace) -> tuple[Backend, Any]:
    import torch

    from gradientspace.inference import RoutedModel, adapters_of, named_folders, template_of
    from gradientspace.models import load_base, load_tokenizer
    from gradientspace.serving.local import LocalBackend
    from gradientspace.serving.parity import canaries, plain_logits

    tokenizer, base = load_tokenizer(run.config.model), load_base(run.config.model)
    experts, shared = adapters_of(run)
    ids = torch.tensor(canaries(tokenizer), device=base.device)
    expected = plain_logits(base, named_folders(experts, shared), ids)
    model = RoutedModel(base, tokenizer, experts, router, template_of(run, tokenizer), shared)
    return LocalBackend(model, expected, options.max_batch), tokenizer.decode


def upstream(run: Run, router: Router, options: argparse.Namespace) -> tuple[Backend, Any]:
    from gradientspace.models import load_tokenizer
    from gradientspace.serving.parity import canaries, recorded_fingerprints
    from gradientspace.serving.upstream import UpstreamBackend

    if "{name}" not in options.upstream_name:
        raise ConfigError(f"--upstream-name is {options.upstream_name!r}: it needs {{name}} in it")
    tokenizer = load_tokenizer(run.config.model)
    with_shared = router.threshold is not None and router.fallback == "shared"
    expected = recorded_fingerprints(run, tokenizer, with_shared)

    def upstream_name(name: str) -> str:
        return options.upstream_base if name == "base" else options.upstream_name.format(name=name)

    backend = UpstreamBackend(
        options.upstream, [*(name for name in expected if name != "base"), "base"], canaries(tokenizer), expected,
        upstream_name=upstream_name, api_key=os.environ.get(UPSTREAM_KEY_VARIABLE), tolerance=options.parity_tolerance,
    )  # fmt: skip
    return backend, tokenizer.decode
