"""Base model, tokenizer and LoRA adapters: the only home of transformers' and PEFT's quirks.

transformers and peft take seconds to import, so they are imported inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from gradientspace.config import LoraConfig, ModelConfig
from gradientspace.damage import reading, require
from gradientspace.errors import ModelError
from gradientspace.progress import no_loading_bar

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_HUB_CACHE = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)/?$")


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer; where it has no padding token, the end-of-sequence token pads."""
    from transformers import AutoTokenizer

    tokenizer = _from_hub_or_folder(AutoTokenizer, "tokenizer", config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {config.model_name_or_path} has neither a padding nor an end token")
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id; `load_tokenizer` has seen to it that there is one."""
    return cast(int, tokenizer.pad_token_id)


def load_base(config: ModelConfig) -> PreTrainedModel:
    """The base model in eval mode on its device, without gradients. Raises `ModelError` in one line."""
    from transformers import AutoModelForCausalLM

    folder = Path(config.model_name_or_path)
    if folder.is_dir() and not any(p for pattern in _WEIGHTS for p in folder.glob(pattern)):
        raise ModelError(f"{folder} has no weights (*.safetensors): give a complete model folder or a hub id")
    device = pick_device(config.device)
    with no_loading_bar():
        model = _from_hub_or_folder(
            AutoModelForCausalLM,
            "model",
            config,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            **_quantised(config, device),
        )
    model = model.requires_grad_(False).eval()
    # A quantised model is placed while it is loaded, and must not be moved.
    return model if config.load_in_4bit or config.load_in_8bit else model.to(device)


def _quantised(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` for a bitsandbytes base. Raises `ModelError` where it cannot run."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return {}
    option = "model.load_in_4bit" if config.load_in_4bit else "model.load_in_8bit"
    if device.type != "cuda":
        raise ModelError(f"{option} needs a CUDA device, and the model is to run on {device.type}: switch it off")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{option} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    # NF4 with double quantisation and bfloat16 matmuls: QLoRA (arXiv 2305.14314).
    options = BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": options, "device_map": {"": device.index or 0}}


def base_config(config: ModelConfig) -> Any:
    """The base's configuration, without its weights."""
    from transformers import AutoConfig

    return _from_hub_or_folder(AutoConfig, "configuration", config)


def public_id(config: ModelConfig) -> tuple[str, str | None] | None:
    """Hub id and revision under which others find the base, `None` where it is only a folder here."""
    name = config.model_name_or_path
    if config.hub_id:
        return config.hub_id, config.revision
    if not Path(name).expanduser().is_dir():
        return name, config.revision
    cached = _HUB_CACHE.search(str(Path(name).expanduser().absolute()))
    return (f"{cached['org']}/{cached['name']}", cached["revision"]) if cached else None


def _from_hub_or_folder(loader: Any, what: str, config: ModelConfig, **options: Any) -> Any:
    name = config.model_name_or_path
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ModelError(f"model folder {name} does not exist: give a model folder or a hub id")
    try:
        return loader.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load the {what} of {name}: {reason}") from error


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT asks transformers for an attribute by its deprecated name; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


@contextlib.contextmanager
def lora(base: PreTrainedModel, config: LoraConfig, *, start: Path | None, seed: int) -> Iterator[PeftModel]:
    """`base` with one trainable adapter, removed again at the end.

    `start` is an adapter folder to take the weights from; `None` draws fresh ones (A random, B zero) from `seed`.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
    )
    try:
        with _quiet_peft():
            model = get_peft_model(base, peft_config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules={config.target_modules!r} does not fit the model: {error}") from error
    try:
        if start is not None:
            _load_weights(model, start)
        yield model  # type: ignore[misc]
    finally:
        _detach(base)
        base.requires_grad_(False).eval()


def _load_weights(model: PeftModel, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with reading(folder, "train it again", ModelError):
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        require(all(bool(tensor.isfinite().all()) for tensor in tensors.values()), "a weight is not finite")
        result = set_peft_model_state_dict(model, tensors)
        lacking = [name for name in result.missing_keys if ".lora_" in name]
        require(not lacking, f"it lacks weights of {len(lacking)} layers")
    if result.unexpected_keys:
        raise ModelError(f"adapter {folder} does not fit the model: unexpected {result.unexpected_keys[0]}")


def save_adapter(model: PeftModel, folder: Path, base: ModelConfig | None = None) -> None:
    """An ordinary PEFT adapter folder: adapter_config.json and adapter_model.safetensors.

    Where `base` has a public id, the adapter names that as its base instead of a path on this machine.
    """
    model.save_pretrained(str(folder), safe_serialization=True)
    # PEFT's model card is an unfilled form; ours come from the run's own numbers.
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    if isinstance(values.get("target_modules"), list):
        values["target_modules"].sort()  # PEFT writes a set in hash order, which differs from process to process
    public = public_id(base) if base else None
    if public:
        values["base_model_name_or_path"], values["revision"] = public
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str) -> None:
    """The tokenizer with the template that the training used, so that other programs render prompts alike."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))


def _detach(base: Any) -> None:
    """Take PEFT's layers off the base again, also those of an adapter that failed half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(base.get_submodule(parent), attribute, module.get_base_layer())
    # PEFT leaves its config on the base and warns at the next adapter; we attach one after another on purpose.
    if hasattr(base, "peft_config"):
        del base.peft_config


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's config, checked before PEFT sees it. Raises `ModelError` for what is no LoRA adapter of safetensors.

    An adapter is data, often somebody else's. PEFT would take pickled weights where there are no safetensors, import
    the module that `megatron_core` names, load a tokenizer with code of its own for a prompt-tuning adapter, allocate
    any rank, and match any regular expression against the base's layers, however long that takes.
    """
    with reading(folder / "adapter_config.json", "give a complete adapter folder", ModelError):
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(f"adapter {folder} has no adapter_model.safetensors: pickled weights are never read")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config.get("peft_type")
        if kind != "LORA":
            raise ModelError(f"adapter {folder} is {kind!r}: only LoRA adapters are loaded")
        for option in ("megatron_config", "loftq_config", "eva_config", "corda_config"):
            require(not config.get(option), f"{option} is set, which is not loaded from others' files")
        starts = config.get("init_lora_weights", True)
        require(isinstance(starts, bool) or starts == "gaussian", f"init_lora_weights is {starts!r}")
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        require(all(type(r) is int and 1 <= r <= 4096 for r in ranks), "a rank is no whole number from 1 to 4096")
        require(isinstance(config["lora_alpha"], int | float) and 0 < config["lora_alpha"] < 1e9, "lora_alpha")
        modules = config["target_modules"]
        require(isinstance(modules, str) or (modules and all(isinstance(m, str) for m in modules)), "target_modules")
        patterns = [*([modules] if isinstance(modules, str) else []), *(config.get("rank_pattern") or {})]
        patterns += [*(config.get("alpha_pattern") or {}), *_texts(config.get("exclude_modules"))]
        patterns += _texts(config.get("layers_pattern"))
        # A repeated group can take exponential time.
        require(not any(re.search(r"\)\s*[*+{]", p) or len(p) > 500 for p in patterns), "a pattern repeats a group")
        return config


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[None]:
    """PEFT only warns where weights are missing, and their layers would silently stay untrained."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ModelError(f"adapter {folder} lacks weights of some layers: train it again, or take another")
        if "is_gradient_checkpointing" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def load_adapters(base: PreTrainedModel, folders: dict[str, Path]) -> PeftModel:
    """`base` with several frozen adapters, by name; the first one is active."""
    from peft import PeftModel

    model: PeftModel | None = None
    for folder in folders.values():
        read_adapter_config(folder)
    try:
        for name, folder in folders.items():
            with reading(folder, "train it again, or take another", ModelError), _complete(folder):
                if model is None:
                    model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
                else:
                    model.load_adapter(str(folder), adapter_name=name)
    except ModelError:
        _detach(base)
        raise
    if model is None:
        raise ModelError("no adapter to load")
    model.requires_grad_(False)
    return model.eval()
