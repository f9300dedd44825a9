"""Every option of GradientSpace, once: its name, type, default and help text.

The dataclasses below are the config file, the command-line flags and the API at the same time; an attribute's
docstring is its help. `load_config` and `GradientSpaceConfig.from_dict` are strict: an unknown key is refused with
the nearest known name, a value of another type with the type that fits. This module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gradientspace.errors import ConfigError
from gradientspace.strict import build, override, parse_yaml, shown

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SERVED_RANKS = (8, 16, 32, 64)
"""LoRA ranks that every engine we export to serves; an export pads others to the next one."""


@dataclass
class ModelConfig:
    model_name_or_path: str = ""
    """A folder with a causal language model in Hugging Face's format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights; `auto` keeps what the checkpoint says."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel of transformers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs; `auto` takes an accelerator when there is one."""
    trust_remote_code: bool = False
    """Run Python code that a hub model brings along. Off unless you know the author."""
    load_in_4bit: bool = False
    """Hold the base's weights in 4 bits (NF4 of bitsandbytes); needs a CUDA device."""
    load_in_8bit: bool = False
    """Hold the base's weights in 8 bits (LLM.int8 of bitsandbytes); needs a CUDA device."""
    hub_id: str | None = None
    """Public id of the model where `model_name_or_path` is a local copy; the adapters record it as their base."""


@dataclass
class SourceConfig:
    path: str = ""
    """A jsonl, json, csv or parquet file, a folder of them, or a hub data set id."""
    name: str | None = None
    """What the source is called in reports; default: the file's stem."""
    config: str | None = None
    """Configuration of a hub data set, for example `main` of GSM8K."""
    split: str = "train"
    """Split of a hub data set."""
    weight: float = 1.0
    """Share of the source's rows that is used, between 0 (none) and 1 (all)."""
    limit: int | None = None
    """At most this many rows, the first ones."""
    fields: dict[str, str] = field(default_factory=dict)
    """Our field name -> the file's column, where detection is not wanted."""


@dataclass
class DataConfig:
    train: list[SourceConfig] = field(default_factory=list)
    """The mix. Split by ids and seed into fit and dev."""
    dev: list[SourceConfig] = field(default_factory=list)
    """Rows for calibration and, the half named dev_b, for choices; empty: `dev_fraction` of the mix."""
    test: list[SourceConfig] = field(default_factory=list)
    """Held-out rows, only ever evaluated; empty: `test_fraction` of the training rows is held out."""
    test_fraction: float = 0.1
    """Share of the training rows held out as test where no test source is named."""
    dev_fraction: float = 0.1
    """Share of the training rows held out as dev where no dev source is named."""
    warmup_fraction: float = 0.05
    """Share of fit that the warm-up adapter is trained on."""
    n_validation: int = 512
    """Number M of validation gradients from which K and the subspace are found."""
    max_length: int = 512
    """Longest sample in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a longer sample."""
    max_loss_fraction: float = 0.5
    """The run stops when more than this share of the rows is lost."""
    streaming: bool = False
    """Keep texts and tokens in a file instead of memory, for data larger than that; somewhat slower."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: the tokenizer's template; `plain`: an instruction template; `auto`: chat where there is one."""
    system_prompt: str | None = None
    """A system message put before every conversation that has none."""


@dataclass
class LoraConfig:
    lora_r: int = 8
    """Rank of every adapter; engines serve 8, 16, 32 and 64 as they are."""
    lora_alpha: int = 16
    """Scale of the update is lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input while training; gradients are always taken without."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter: `all-linear` or their names."""


@dataclass
class TrainingConfig:
    learning_rate: float = 1e-3
    """Peak learning rate of every phase."""
    num_train_epochs: float = 2.0
    """Passes over fit that every compared method gets in total after the warm-up."""
    per_device_train_batch_size: int = 16
    """Samples in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimiser step."""
    lr_scheduler_type: str = "cosine"
    """Shape of the learning rate over a phase, a name of transformers."""
    warmup_ratio: float = 0.05
    """Share of a phase's steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's decay of the adapter's weights."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    bf16: bool = False
    """Mixed precision: matmuls in bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Tracker that gets loss and learning rate of every phase; its package must be installed."""
    checkpoint_seconds: float = 120.0
    """A training that is killed goes on from a checkpoint at most this old, and some steps; 0: as often as possible."""
    early_stopping_patience: int | None = None
    """Stop a phase after this many evaluations on dev_a without a better one, and keep the best; then the compared
    methods no longer see equal tokens. Default: never."""
    eval_steps: float = 0.1
    """With early stopping: steps between two evaluations; below one, a share of the phase's steps."""


@dataclass
class WarmupConfig:
    num_train_epochs: float = 3.0
    """Passes over the warm-up split."""
    learning_rate: float | None = None
    """Peak learning rate of the warm-up; default: that of `training`."""


@dataclass
class GradientsConfig:
    max_tokens_per_batch: int = 4096
    """Token budget of one batch of per-sample gradients, padding included."""
    projection_dim: int = 0
    """Also keep a random projection of every gradient to this many numbers, for the baselines `less` and
    `projection-…`; a multiple of 2048, and 8192 in the literature. 0: none."""


@dataclass
class ClusteringConfig:
    method: Literal["gradient", "embedding", "tfidf", "random", "source"] = "gradient"
    """What the groups are made of: LoRA gradients, prompt embeddings, words of the prompt, chance, or the source."""
    target: Literal["plain", "routable"] = "routable"
    """`plain`: the paper's online SVD clusters; `routable`: clusters of the part the prompt can predict."""
    n_clusters: int | Literal["auto"] = "auto"
    """K, or `auto`: estimated from the singular values of the validation gradients."""
    k_min: int = 1
    """Smallest K that `auto` may choose."""
    k_max: int = 16
    """Largest K that `auto` may choose."""
    undetermined_n_clusters: int = 8
    """K where the spectrum does not determine one; the run says so when it is used."""
    n_components: int = 64
    """Dimension q of the dominant gradient subspace."""
    cache_size: int = 32
    """Unit gradients a cluster collects before its centroid moves."""
    momentum: float = 0.1
    """Weight of the new direction when a centroid moves."""
    update: Literal["svd", "mean", "running"] = "svd"
    """How a centroid moves: towards its cache's dominant singular vector (the paper), its cache's mean, or as the
    running mean of all its samples."""
    center: bool = True
    """Subtract the validation mean of unit gradients before clustering."""
    sync_every: int = 0
    """Samples that are assigned under the same centroids before these move (whole batches); 0: one batch. With many
    processes a larger number exchanges centroids less often; it, and not their number, decides the result."""
    n_init: int = 30
    """Restarts of spherical k-means."""
    ridge: float | Literal["auto"] = "auto"
    """Penalty of the ridge regression from prompt embeddings to gradient coordinates (routable); `auto`: of nine
    from 0.1 to 1000 the one whose out-of-fold predictions explain most."""
    settle: Literal["none", "coordinates", "exact"] = "none"
    """After the online pass: keep its labels, or reassign by coordinates, or by a second gradient pass."""
    min_cluster_size: int = 20
    """Smaller clusters merge into their nearest neighbour."""
    memory_budget_gib: float | None = None
    """What the clusterer may hold, in GiB: caches shrink and validation gradients are made block by block to fit."""


@dataclass
class ExpertsConfig:
    start: Literal["shared", "warmup", "fresh"] = "shared"
    """What every expert starts from: an adapter trained on all of fit, the warm-up adapter, or nothing."""
    shared_share: float = 0.5
    """Share of `training.num_train_epochs` spent on the shared adapter (with start = shared)."""


@dataclass
class RouterConfig:
    encoder_name_or_path: str = DEFAULT_ENCODER
    """Sentence encoder: a folder or a hub id; the default also comes from a PyPI package."""
    head: Literal["logistic", "ridge"] = "logistic"
    """Classifier on the frozen embedding; `ridge` needs routable clusters."""
    fallback: Literal["none", "shared", "base", "error"] = "none"
    """Who answers prompts that the router is unsure of, where dev_b shows that this lowers the loss."""


Baseline = Literal[
    "single-wide", "single-long", "random", "embedding", "tfidf", "source",
    "plain", "less", "projection-512", "projection-2048", "elrea", "gradientspace-paper",
]  # fmt: skip
InferenceMode = Literal["oracle", "nearest-centroid", "uniform-ensemble", "weighted-ensemble"]


@dataclass
class EvaluationConfig:
    baselines: list[Baseline] = field(default_factory=list)
    """Methods trained and evaluated beside base, single and gradientspace, with the same start and tokens (except
    `single-long`: K times the tokens). What each one is: docs/baselines.md."""
    inference_modes: list[InferenceMode] = field(default_factory=lambda: ["oracle"])
    """Other ways to answer with the same experts: the best one a sample by its loss, the one whose centroid is
    nearest to the sample's own gradient, or all of them, logits averaged evenly or by the router's probabilities."""
    split: Literal["test", "dev_b"] = "test"
    """`dev_b` for every choice; `test` once a committed table."""
    per_device_eval_batch_size: int = 32
    """Samples in one evaluation or generation batch."""
    exact_match: bool = False
    """Also generate greedily and compare with the reference, white space normalised."""
    max_new_tokens: int = 64
    """Longest generated answer in tokens."""
    scorers: dict[str, str] = field(default_factory=dict)
    """Source or domain -> how its answers are scored: `exact` (the default), `number` (GSM8K), `answer` (TAT-QA) or
    `code` (MBPP, HumanEval)."""
    run_code: bool = False
    """Let the scorer `code` run what the model wrote, in a subprocess with limits. Not a wall: see sandbox.py."""


@dataclass
class ExportConfig:
    engine: Literal["none", "vllm", "sglang", "ollama", "litellm"] = "none"
    """An engine that shall serve the experts: what it cannot serve is refused before anything is trained."""


@dataclass
class DiagnosisConfig:
    n_samples: int = 600
    """Rows whose gradients `diagnose` takes: one half fits every grouping, the other judges it."""
    pilot_steps: int = 100
    """Optimiser steps of each arm of the pilot."""
    min_gain: float = 0.002
    """Nats of dev loss that a split, or a mix without one source, must gain to be advised; beside an interval that
    excludes zero."""


@dataclass
class GradientSpaceConfig:
    name: str | None = None
    """Name of the run; default: the config file's stem."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Seed of splits, stream order, initialisation, training and router."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / (self.name or "run")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GradientSpaceConfig:
        """Build a config from nested dicts as YAML gives them. Raises `ConfigError` for the first fault found."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> GradientSpaceConfig:
        """Read a config file, see `load_config`."""
        return load_config(path)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def validate(self) -> GradientSpaceConfig:
        """Check ranges and combinations; returns self. Raises `ConfigError`."""
        if not self.model.model_name_or_path:
            raise ConfigError("model.model_name_or_path is missing: give a model folder or a hub id")
        if not self.data.train:
            raise ConfigError("data.train is empty: give at least one source with a path")
        for i, source in enumerate([*self.data.train, *self.data.dev, *self.data.test]):
            if not source.path:
                raise ConfigError(f"data source {i + 1} has no path: give a file, a folder or a hub data set id")
        for key, (low, high) in _RANGES.items():
            section, option = key.split(".")
            value = getattr(getattr(self, section), option)
            if isinstance(value, int | float) and not low <= value <= high:
                raise ConfigError(f"{key} is {shown(value)}; it must be between {low:g} and {high:g}")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ConfigError(f"seed is {shown(self.seed)}; it must be between 0 and {_LARGEST_SEED}")
        _check_name(self.name)
        tracker = self.training.report_to
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"training.report_to is {tracker}, which is not installed: pip install {tracker}")
        if self.model.load_in_4bit and self.model.load_in_8bit:
            raise ConfigError("model.load_in_4bit and model.load_in_8bit are both on: choose one")
        if self.export.engine != "none" and self.lora.lora_r > SERVED_RANKS[-1]:
            raise ConfigError(
                f"lora.lora_r is {self.lora.lora_r}, which {self.export.engine} cannot serve: use at most "
                f"{SERVED_RANKS[-1]}, or set export.engine to none"
            )
        if self.clustering.k_min > self.clustering.k_max:
            raise ConfigError(
                f"clustering.k_min is {self.clustering.k_min}, above clustering.k_max ({self.clustering.k_max})"
            )
        if self.clustering.method != "gradient" and self.clustering.n_clusters == "auto":
            raise ConfigError(
                f"clustering.n_clusters is auto, which needs gradients: give a number with "
                f"clustering.method={self.clustering.method}"
            )
        if self.clustering.settle != "none" and self.clustering.target == "routable":
            raise ConfigError(
                f"clustering.settle={self.clustering.settle} reassigns by gradient, which a prompt cannot predict: "
                "use it with clustering.target=plain"
            )
        if self.router.fallback == "shared" and self.experts.start != "shared":
            raise ConfigError(
                f"router.fallback=shared needs experts.start=shared, which is {self.experts.start}; use base or error"
            )
        for name, scorer in self.evaluation.scorers.items():
            if scorer not in ("exact", "number", "answer", "code"):
                raise ConfigError(f"evaluation.scorers: {name} is {scorer!r}; use exact, number, answer or code")
            if scorer == "code" and not self.evaluation.run_code:
                raise ConfigError(
                    f"evaluation.scorers: {name} is scored by running what the model wrote; "
                    "set evaluation.run_code=true if you trust it to"
                )
        projected = {"less": 8192, "projection-2048": 2048, "projection-512": 512}
        for name, width in projected.items():
            if name in self.evaluation.baselines and (self.clustering.method != "gradient" or not self._keeps(width)):
                raise ConfigError(
                    f"baseline {name} needs projected gradients: set gradients.projection_dim=8192 "
                    f"(it is {self.gradients.projection_dim}) with clustering.method=gradient"
                )
        for name in ("plain", "gradientspace-paper"):
            if name in self.evaluation.baselines and self.clustering.method != "gradient":
                raise ConfigError(f"baseline {name} needs clustering.method=gradient, not {self.clustering.method}")
        if self.router.head == "ridge" and self.clustering.target != "routable":
            raise ConfigError("router.head=ridge needs clustering.target=routable; use router.head=logistic")
        return self

    def _keeps(self, width: int) -> bool:
        kept = self.gradients.projection_dim
        return kept >= width and kept % width == 0


def _check_name(name: str | None) -> None:
    """The run's name becomes one folder in `output_dir`, and never leads out of it."""
    if name is not None and (not name.isprintable() or set(name) & set("/\\") or name.strip(". ") == ""):
        raise ConfigError(f"name is {shown(name)}; it names a folder in output_dir: use letters, digits, - and _")
    if name is not None and len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        raise ConfigError(f"name has {len(name)} characters; it names a folder: use at most {_LONGEST_NAME} bytes")


_INF = float("inf")
_LARGEST_SEED = 2**32 - 1
"""What NumPy takes; torch would take more."""
_LONGEST_NAME = 200
"""Bytes; file systems take 255, and some stages and exports put a suffix behind it."""
_RANGES: dict[str, tuple[float, float]] = {
    "data.test_fraction": (0, 0.9),
    "data.dev_fraction": (0.01, 0.9),
    "data.warmup_fraction": (0.001, 0.9),
    "data.n_validation": (2, 100_000),
    "data.max_length": (8, 1_000_000),
    "data.max_loss_fraction": (0, 1),
    "lora.lora_r": (1, 4096),
    "lora.lora_alpha": (1, 65536),
    "lora.lora_dropout": (0, 0.99),
    "training.learning_rate": (1e-9, 10),
    "training.num_train_epochs": (0.001, 10_000),
    "training.per_device_train_batch_size": (1, 65536),
    "training.gradient_accumulation_steps": (1, 65536),
    "training.warmup_ratio": (0, 1),
    "training.checkpoint_seconds": (0, 1_000_000),
    "training.early_stopping_patience": (1, 100_000),
    "training.eval_steps": (0.0001, 1_000_000),
    "warmup.num_train_epochs": (0.001, 10_000),
    "gradients.max_tokens_per_batch": (8, 10_000_000),
    "gradients.projection_dim": (0, 1_048_576),
    "clustering.n_clusters": (1, 4096),
    "clustering.k_min": (1, 4096),
    "clustering.k_max": (1, 4096),
    "clustering.undetermined_n_clusters": (1, 4096),
    "clustering.n_components": (1, 100_000),
    "clustering.cache_size": (1, 100_000),
    "clustering.momentum": (0, 1),
    "clustering.n_init": (1, 10_000),
    "clustering.sync_every": (0, 1_000_000_000),
    "clustering.ridge": (0, _INF),
    "clustering.min_cluster_size": (1, 1_000_000_000),
    "clustering.memory_budget_gib": (0.001, 1_000_000),
    "experts.shared_share": (0.01, 0.99),
    "evaluation.per_device_eval_batch_size": (1, 65536),
    "evaluation.max_new_tokens": (1, 100_000),
    "diagnosis.n_samples": (40, 100_000),
    "diagnosis.pilot_steps": (2, 1_000_000),
    "diagnosis.min_gain": (0.0, 100.0),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> GradientSpaceConfig:
    """Read a YAML config. The run's name defaults to the file's stem. Raises `ConfigError`.

    `overrides` are command-line words, `--section.option value`, whose values are read as YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text, so not valid YAML") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}") from error
    values = parse_yaml(text, f"config file {path}")
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} is empty or not a mapping of sections")
    config = GradientSpaceConfig.from_dict(override(values, overrides))
    config.name = config.name or path.stem
    return config
