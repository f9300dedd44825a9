"""What the stages of one run share: the run folder, and base, tokenizer, data and encoder, each loaded at first use.

A finished stage loads nothing, so resuming a run costs only what is still to be done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gradientspace.config import ClusteringConfig, GradientSpaceConfig, LoraConfig
from gradientspace.data import Dataset, Sample, Template, load
from gradientspace.encoder import Encoder
from gradientspace.errors import ConfigError, RunFolderError
from gradientspace.files import digest, write_json
from gradientspace.grouping import Groups
from gradientspace.models import load_base, load_tokenizer, lora, padding_id, save_adapter, save_tokenizer
from gradientspace.ranks import ranks
from gradientspace.run_folder import CHECKPOINTS, Run
from gradientspace.training import train_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Job:
    """One run at work."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def config(self) -> GradientSpaceConfig:
        return self.run.config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model)

    @cached_property
    def base(self) -> PreTrainedModel:
        return load_base(self.config.model)

    @cached_property
    def data(self) -> Dataset:
        """The splits; refused where they are not the ones that finished stages were made from."""
        data = load(self.config.data, self.tokenizer, self.config.seed)
        check_n_clusters(self.config.clustering, data)
        if self.run.is_whole("data"):
            recorded = self.run.path / "data/fingerprint.json"
            before, now = json.loads(recorded.read_text()), data.fingerprint()
            changed = [split for split in now if before.get(split) != now[split]]
            if changed:
                raise RunFolderError(
                    f"the data of {self.run.path} has changed since the run began ({', '.join(changed)}): "
                    "restore the files, or start a new run with another --name"
                )
        return data

    @cached_property
    def template(self) -> Template:
        return Template(self.tokenizer, self.config.data.template, self.config.data.system_prompt)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.config.router.encoder_name_or_path)

    def evaluated(self) -> Sequence[Sample]:
        """The samples of the split that `evaluation.split` names."""
        return self.data.test if self.config.evaluation.split == "test" else self.data.dev_b

    def calibrated_on(self) -> Sequence[Sample]:
        """What the router's calibration comes from: dev_a, and dev_b where nothing is chosen or judged there."""
        config, data = self.config, self.data
        spare = config.router.fallback == "none" and config.evaluation.split != "dev_b"
        return [*data.dev_a, *data.dev_b] if spare else data.dev_a

    def train(
        self,
        name: str,
        samples: Callable[[], Sequence[Sample]],
        *,
        epochs: float,
        start: Path | None,
        inputs: tuple[str, ...],
        learning_rate: float | None = None,
        held_out: Callable[[], Sequence[Sample]] | None = None,
        served: bool = False,
        shape: LoraConfig | None = None,
    ) -> Path:
        """Stage: one adapter trained on `samples()` from the adapter in `start`. Returns its folder.

        `held_out()` serves early stopping; default: `dev_a`. A killed training goes on from its last checkpoint.
        An adapter that is to be `served` gets tokenizer and chat template beside it. `shape` is the adapter's rank
        and scale where they are not those of the run.
        """

        def make(folder: Path) -> None:
            with lora(self.base, shape or self.config.lora, start=start, seed=self.config.seed) as model:
                summary = train_adapter(
                    model,
                    samples(),
                    self.config.training,
                    epochs=epochs,
                    seed=self.config.seed,
                    pad_token_id=padding_id(self.tokenizer),
                    label=name,
                    learning_rate=learning_rate,
                    held_out=held_out() if held_out else self.data.dev_a,
                    checkpoints=folder / CHECKPOINTS,
                    logs=self.run.path / "logs" / name,
                    made_from=digest(self.run.fingerprint(inputs)),
                )
                save_adapter(model, folder, self.config.model)
            if served:
                save_tokenizer(self.tokenizer, folder, self.template.jinja)
            write_json(folder / "training.json", summary.to_dict())

        return self.run.stage(name, make, inputs=inputs, resumable=True)

    def train_experts(self, prefix: str, groups: Groups, *, inputs: tuple[str, ...]) -> list[Path]:
        """Stages `prefix/0`, `prefix/1`, …: one expert a group, all from the same start, for the rest of the budget.

        Every process of the run takes the next one when it is free, the largest first, and trains it alone.
        """
        here = ranks()
        labels = {"fit": groups.fit, "held_out": groups.held_out, "n_clusters": groups.n_clusters}
        here.order("experts", self.run, prefix=prefix, groups=labels, inputs=inputs)
        dev_clusters = groups.held_out[: len(self.data.dev_a)]
        turns = sorted(range(groups.n_clusters), key=lambda k: -groups.sizes[k] if here.size > 1 else k)
        for turn in here.queue(groups.n_clusters):
            k = turns[turn]
            self.train(
                f"{prefix}/{k}",
                lambda k=k: groups.members(self.data.fit)[k],
                epochs=self.expert_epochs,
                start=self.expert_start,
                inputs=(*inputs, *self.start_stages),
                held_out=lambda k=k: [s for s, c in zip(self.data.dev_a, dev_clusters, strict=True) if c == k],
                served=prefix == "experts",
            )
        here.meet()
        names = [f"{prefix}/{k}" for k in range(groups.n_clusters)]
        if here.rank == 0:
            self.run.arrange(names)
        return [self.run.path / name for name in names]

    @property
    def shared_epochs(self) -> float:
        experts = self.config.experts
        return self.config.training.num_train_epochs * (experts.shared_share if experts.start == "shared" else 0.0)

    @property
    def expert_epochs(self) -> float:
        return self.config.training.num_train_epochs - self.shared_epochs

    @property
    def start_stages(self) -> tuple[str, ...]:
        start = self.config.experts.start
        return () if start == "fresh" else (start,)

    @property
    def expert_start(self) -> Path | None:
        """The adapter that every expert, and the single adapter beside them, starts from."""
        return self.run.path / self.start_stages[0] if self.start_stages else None

    @property
    def shared_stage(self) -> list[Path]:
        """The shared adapter's folder, where there is one: a cost that every arm with that start has paid."""
        return [self.run.path / "shared"] if self.config.experts.start == "shared" else []


def check_n_clusters(options: ClusteringConfig, data: Dataset) -> None:
    """Refuse more clusters than there is data for, before anything is trained. Raises `ConfigError`."""
    key = "k_min" if options.n_clusters == "auto" else "n_clusters"
    wanted = getattr(options, key)
    gradient = options.method == "gradient"
    rows, what = (
        (data.validation, "validation gradients (data.n_validation)") if gradient else (data.fit, "rows to fit")
    )
    if wanted > len(rows):
        raise ConfigError(f"clustering.{key} is {wanted}, but there are {len(rows)} {what}: ask for fewer clusters")
