"""`gradientspace export RUN --engine ENGINE`: a folder that an inference engine serves the experts from.

The folder is complete in itself: copies of the adapters, the chat template that the training used, the launch line as
a script, the engine's own config files, and a README. Only the base is elsewhere; `BASE` names it.

| engine | what is written | who routes |
|---|---|---|
| vllm | `serve.sh` | `gradientspace serve --upstream` in front |
| sglang | `serve.sh` | `gradientspace serve --upstream` in front |
| ollama | `Modelfile.NAME` for base and experts, `create.sh` | the caller picks the model |
| litellm | `config.yaml`, `serve.sh` | `gradientspace serve` behind it |
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gradientspace.config import SERVED_RANKS, ModelConfig
from gradientspace.damage import reading, require
from gradientspace.errors import ModelError
from gradientspace.files import write_text
from gradientspace.plain_text import one_line
from gradientspace.run_folder import Run

_AGAIN = "train it again"
BASE_NAME = "base"
"""Under this name the engines serve the base without an adapter."""

_OLLAMA_ADAPTERS = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM")
"""Architectures whose safetensors adapters Ollama converts."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


@dataclass(frozen=True)
class _Parts:
    """What a folder is written from."""

    names: list[str]
    """Names of the adapters, `expert_0`, …, maybe `shared`, which are also their folders below `adapters/`."""
    base: str
    """Public id of the base, or its folder on this machine."""
    rank: int
    target_modules: list[str]
    chat_template: str
    is_plain: bool
    stops: list[str]
    run: Path


def export(run: Run, engine: str, output: Path | None = None) -> Path:
    """Check the experts of a finished run for `engine` and write its folder. Returns the folder.

    Raises `RunFolderError` where there are no experts yet, `ModelError` where the engine cannot serve them.
    """
    from gradientspace.inference import adapters_of, named_folders, template_of
    from gradientspace.models import base_config, load_tokenizer, public_id

    folders = named_folders(*adapters_of(run))
    ranks = [check_adapter(folder, engine)["r"] for folder in folders.values()]
    check_base(base_config(run.config.model), engine)
    template = template_of(run, load_tokenizer(run.config.model))
    public = public_id(run.config.model)
    parts = _Parts(
        names=list(folders),
        base=public[0] if public else str(Path(run.config.model.model_name_or_path).expanduser().resolve()),
        rank=served_rank(ranks[0]),
        target_modules=_modules(folders["expert_0"]),
        chat_template=template.jinja,
        is_plain=template.kind == "plain",
        stops=[str(t) for t in template.tokenizer.convert_ids_to_tokens(template.stop_ids)],
        run=run.path,
    )
    output = output or run.path / "export" / engine
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, folder in folders.items():
        copy_adapter(folder, partial / "adapters" / name, parts.rank)
    for file, text in _WRITERS[engine](parts).items():
        write_text(partial / file, text)
        if file.endswith(".sh"):
            (partial / file).chmod(0o755)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return output


def check_adapter(folder: Path, engine: str) -> dict[str, Any]:
    """The adapter's config, where it is plain LoRA that `engine` serves. Raises `ModelError` in one line."""
    from safetensors import safe_open

    from gradientspace.models import read_adapter_config

    config = read_adapter_config(folder)
    reasons = {
        f"its rank is {config['r']}, above {SERVED_RANKS[-1]}": config["r"] > SERVED_RANKS[-1],
        "it trains whole modules (modules_to_save)": bool(config.get("modules_to_save")),
        "it trains tokens of its own": bool(config.get("trainable_token_indices")),
        "it trains biases": config.get("bias", "none") != "none",
        "its rank differs from layer to layer (rank_pattern)": bool(config.get("rank_pattern")),
        "its scale differs from layer to layer (alpha_pattern)": bool(config.get("alpha_pattern")),
        "it is DoRA": bool(config.get("use_dora")),
    }
    with (
        reading(folder, _AGAIN, ModelError),
        safe_open(str(folder / "adapter_model.safetensors"), "np") as tensors,
    ):
        names = list(tensors.keys())
    reasons["it has weights for the embedding or the head"] = any(e in n for n in names for e in _EMBEDDINGS)
    _refuse(folder, engine, reasons)
    return config


def served_rank(rank: int) -> int:
    """The smallest rank from `rank` on that every engine serves."""
    return next(r for r in SERVED_RANKS if r >= rank)


def copy_adapter(folder: Path, target: Path, rank: int) -> None:
    """The adapter at a rank that engines serve: zero rows of A and columns of B change nothing that it computes.

    The scale lora_alpha / r is kept.
    """
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import pad

    from gradientspace.models import read_adapter_config

    config = read_adapter_config(folder)
    more = rank - config["r"]
    padding = {"lora_A": (0, 0, 0, more), "lora_B": (0, more)}
    with reading(folder, _AGAIN, ModelError):
        tensors = {
            name: pad(tensor, next(sides for part, sides in padding.items() if f".{part}." in name))
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        }
        for name, tensor in tensors.items():
            own = tensor.shape[0 if ".lora_A." in name else 1]
            require(tensor.ndim == 2 and own == rank and tensor.isfinite().all(), f"{name} is no finite rank {rank}")
    alpha = config["lora_alpha"] * rank / config["r"]
    config |= {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha}
    config["target_modules"] = _modules(folder)
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    write_text(target / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _modules(folder: Path) -> list[str]:
    """Last names of the layers that have an adapter, as engines know them: PEFT may record whole paths."""
    from safetensors import safe_open

    with (
        reading(folder, _AGAIN, ModelError),
        safe_open(str(folder / "adapter_model.safetensors"), "np") as tensors,
    ):
        modules = sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors.keys()})  # noqa: SIM118
        # They are written into a shell script.
        require(all(re.fullmatch(r"\w+", module, re.ASCII) for module in modules), "a layer's name is none")
        return modules


def check_base(config: Any, engine: str) -> None:
    """Whether `engine` serves adapters of this base (its transformers config). Raises `ModelError` in one line."""
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if engine == "ollama" and architecture not in _OLLAMA_ADAPTERS:
        raise ModelError(
            f"ollama converts no adapters of {architecture}, only of {', '.join(_OLLAMA_ADAPTERS)}: "
            "choose vllm, sglang or litellm"
        )


def check_before_training(engine: str, model: ModelConfig, target_modules: str | list[str]) -> None:
    """What the config alone cannot tell: refuse before any training what `engine` will not serve."""
    from gradientspace.models import base_config

    if engine == "none":
        return
    embeddings = [m for m in target_modules if m in _EMBEDDINGS] if isinstance(target_modules, list) else []
    if embeddings:
        raise ModelError(f"lora.target_modules has {embeddings[0]}, which {engine} cannot serve: leave it out")
    check_base(base_config(model), engine)


def _refuse(folder: Path, engine: str, reasons: dict[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(f"{engine} cannot serve {folder}: {reason}")


# --------------------------------------------------------------------------- files of each engine


def _vllm(parts: _Parts) -> dict[str, str]:
    # One slot more than adapters: with all slots full, requests for the base that were batched with requests for
    # experts got an expert's weights.
    modules = [f"{name}=adapters/{name}" for name in parts.names]
    lines = [
        # The module and not the command `vllm`, which vLLM's CPU builds cannot start.
        'exec "${PYTHON:-python3}" -m vllm.entrypoints.openai.api_server --model "$BASE"',
        f'--host 127.0.0.1 --port "${{PORT:-8000}}" --served-model-name {BASE_NAME}',
        f"--enable-lora --max-loras {len(parts.names) + 1} --max-lora-rank {parts.rank}",
        "--lora-modules " + " ".join(modules),
        "--chat-template chat_template.jinja",
        '"$@"',
    ]
    return {
        "serve.sh": _script(parts, lines),
        "chat_template.jinja": parts.chat_template,
        "README.md": _readme(parts, "vLLM", "pip install vllm", 8000, "{name}"),
    }


def _sglang(parts: _Parts) -> dict[str, str]:
    # SGLang counts requests for the base as one of the adapters of a batch.
    lines = [
        'exec "${PYTHON:-python3}" -m sglang.launch_server --model-path "$BASE"',
        f'--host 127.0.0.1 --port "${{PORT:-30000}}" --served-model-name {BASE_NAME}',
        f"--enable-lora --max-loras-per-batch {len(parts.names) + 1} --max-lora-rank {parts.rank}",
        "--lora-target-modules " + " ".join(parts.target_modules),
        "--lora-paths " + " ".join(f"{name}=adapters/{name}" for name in parts.names),
        "--chat-template chat_template.jinja",
        '"$@"',
    ]
    return {
        "serve.sh": _script(parts, lines),
        "chat_template.jinja": parts.chat_template,
        "README.md": _readme(parts, "SGLang", "pip install 'sglang[all]'", 30000, BASE_NAME + ":{name}"),
    }


def _ollama(parts: _Parts) -> dict[str, str]:
    local = Path(parts.base).is_dir()
    files = {f"Modelfile.{BASE_NAME}": _modelfile(parts, None)}
    files |= {f"Modelfile.{name}": _modelfile(parts, name) for name in parts.names}
    prefix = _model_prefix(parts)
    lines = [
        "#!/bin/sh",
        "# Makes one Ollama model of the base and one of each expert.",
        'cd "$(dirname "$0")" || exit 1',
        *([] if local else [f"[ -d base ] || hf download {shlex.quote(parts.base)} --local-dir base || exit 1"]),
        *(f"ollama create {prefix}-{n} -f Modelfile.{n} || exit 1" for n in (BASE_NAME, *parts.names)),
    ]
    note = (
        "The plain template is written into every Modelfile."
        if parts.is_plain
        else "Ollama recognises the base's own chat template when it imports the base: compare\n"
        f"`ollama show --template {prefix}-{BASE_NAME}` with `chat_template.jinja`, which the training used."
    )
    readme = (
        f"# Experts for Ollama\n\n    ./create.sh\n    ollama run {prefix}-{parts.names[0]}\n\n{note}\n\n"
        f"Ollama does not route: `gradientspace route {parts.run} PROMPT --json` says which expert a prompt goes to.\n"
    )
    shell = "\n".join(lines) + "\n"
    return files | {"create.sh": shell, "README.md": readme, "chat_template.jinja": parts.chat_template}


def _modelfile(parts: _Parts, name: str | None) -> str:
    lines = [f"FROM {parts.base if Path(parts.base).is_dir() else './base'}"]
    if name:
        lines.append(f"ADAPTER ./adapters/{name}")
    if parts.is_plain:
        lines.append(
            'TEMPLATE """{{ if .System }}{{ .System }}\n\n{{ end }}### Instruction:\n{{ .Prompt }}\n\n'
            '### Response:\n{{ .Response }}"""'
        )
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in parts.stops]
    return "\n".join(lines) + "\n"


def _litellm(parts: _Parts) -> dict[str, str]:
    config = {
        "model_list": [
            {
                "model_name": f"{_model_prefix(parts)}-{name}",
                "litellm_params": {
                    "model": f"openai/{name}",
                    "api_base": "os.environ/GRADIENTSPACE_API_BASE",
                    "api_key": "os.environ/GRADIENTSPACE_API_KEY",
                },
            }
            for name in ("auto", BASE_NAME, *parts.names)
        ]
    }
    lines = [
        "#!/bin/sh",
        f"# Start the routing server first: gradientspace serve {shlex.quote(one_line(str(parts.run)))}",
        'cd "$(dirname "$0")" || exit 1',
        'export GRADIENTSPACE_API_BASE="${GRADIENTSPACE_API_BASE:-http://127.0.0.1:8000/v1}"',
        'export GRADIENTSPACE_API_KEY="${GRADIENTSPACE_API_KEY:-none}"',
        'exec litellm --config config.yaml --host 127.0.0.1 --port "${PORT:-4000}" "$@"',
    ]
    readme = (
        f"# Experts behind LiteLLM\n\n    pip install 'litellm[proxy]'\n    gradientspace serve {parts.run} &\n"
        f"    ./serve.sh\n\nThe model `{_model_prefix(parts)}-auto` is routed, the others are the base and one expert "
        "each.\n"
    )
    return {
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        "serve.sh": "\n".join(lines) + "\n",
        "README.md": readme,
    }


def _script(parts: _Parts, lines: list[str]) -> str:
    head = [
        "#!/bin/sh",
        "# The base and its experts, each under its own model name; more options may follow the script's name.",
        'cd "$(dirname "$0")" || exit 1',
        f"BASE=${{BASE:-{shlex.quote(parts.base)}}}",
    ]
    return "\n".join(head) + "\n" + " \\\n  ".join(lines) + "\n"


def _readme(parts: _Parts, engine: str, install: str, port: int, form: str) -> str:
    """`form` is the engine's name of an adapter, with `{name}` for ours."""
    model = form.format(name=parts.names[0])
    naming = "" if form == "{name}" else f" --upstream-name '{form}'"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    url = f"http://127.0.0.1:{port}"
    return (
        f"# Experts for {engine}\n\n"
        f"    {install}\n    ./serve.sh\n\n"
        f"Base: `{parts.base}` (set `BASE` to another copy of it). One expert alone:\n\n"
        f"    curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n      -d '{body}'\n\n"
        f"Routed: `gradientspace serve {parts.run} --port 8080 --upstream {url}{naming}` picks each prompt's expert.\n"
    )


def _model_prefix(parts: _Parts) -> str:
    """The run's name as a model name: lower case, and nothing that a shell or a registry would read otherwise."""
    return (
        "".join(c if c.isalnum() and c.isascii() else "-" for c in parts.run.resolve().name.lower()).strip("-") or "run"
    )


_WRITERS: dict[str, Callable[[_Parts], dict[str, str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "ollama": _ollama,
    "litellm": _litellm,
}
ENGINES = tuple(_WRITERS)
