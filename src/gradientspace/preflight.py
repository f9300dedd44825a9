"""`gradientspace run CONFIG --dry-run`: what each stage will take of time, memory and disk, from a short timed probe.

The probe does the real thing for a few seconds each: the Trainer on batches drawn as the training draws them,
per-sample gradients into a clusterer, the encoder on prompts, losses and answers of one batch. Costs that grow with
text are scaled by tokens, the others by count. What is not timed and stays small against the rest: fitting the
router's head, k-means, reading and writing results.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from gradientspace.clustering.memory import format_bytes
from gradientspace.config import GradientSpaceConfig
from gradientspace.data import Sample
from gradientspace.grouping import held_out, new_clusterer
from gradientspace.job import Job
from gradientspace.memory import PeakMemory, resident_bytes
from gradientspace.models import lora, padding_id, save_adapter, save_tokenizer
from gradientspace.progress import say
from gradientspace.run_folder import Run
from gradientspace.tables import render
from gradientspace.training import optimiser_steps, train_adapter

if TYPE_CHECKING:
    from peft import PeftModel

PROBE_SECONDS = 8.0
"""For each of training and gradients; the others take what one batch takes."""
_VALIDATION_PROBE = 96
"""Validation gradients from which the cost of the subspace is extrapolated."""
_PROMPTS = 96
_NOT_ROUTED = ("random", "source", "single-wide", "single-long", "elrea")
"""Baselines that encode no prompt of their own."""


@dataclass
class Estimate:
    """One stage, or several alike."""

    stage: str
    seconds: float
    peak_bytes: int
    """Resident memory of the process, base included; of the GPU where the model is there."""
    disk_bytes: int
    detail: str = ""


@dataclass
class Rates:
    """What the probe measured, in seconds and bytes."""

    data: float = 0.0
    base: float = 0.0
    step_token: float = 0.0
    """Training, per non-padding token."""
    training: float = 0.0
    """Once a training: adapter, Trainer, saving."""
    gradient_token: float = 0.0
    """Gradient and its way through the clusterer, per token."""
    subspace: float = 0.0
    """Validation gradients into K and the subspace, all of them."""
    encoder: float = 0.0
    """Loading the encoder."""
    prompt: float = 0.0
    """One prompt through the encoder."""
    loss_token: float = 0.0
    answer: float = 0.0
    """One generated answer; 0 where none is asked for."""
    dimension: int = 0
    adapter_bytes: int = 0
    tokenizer_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    """Peak of each probe."""


def estimate(config: GradientSpaceConfig) -> list[Estimate]:
    """Probe, and add up what every stage of `config` will take. Leaves no run folder. Raises what a run would."""
    job = Job(Run(config.run_folder, config.validate()))
    rates = probe(job)
    return add_up(job, rates)


def table(estimates: Sequence[Estimate]) -> str:
    """The estimates as text, with a last line for the whole run."""
    rows = [
        [e.stage, format_seconds(e.seconds), format_bytes(e.peak_bytes), format_bytes(e.disk_bytes), e.detail]
        for e in estimates
    ]
    total = [
        "all", format_seconds(sum(e.seconds for e in estimates)),
        format_bytes(max(e.peak_bytes for e in estimates)), format_bytes(sum(e.disk_bytes for e in estimates)), "",
    ]  # fmt: skip
    return render(["stage", "time", "peak memory", "disk", ""], [*rows, total])


def format_seconds(seconds: float) -> str:
    """95 -> '1 min 35 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"
    )


# ------------------------------------------------------------------------------ the probe


def probe(job: Job) -> Rates:
    """Measure for some seconds what a run's stages are made of."""
    say("a short timed probe ...")
    rates = Rates()
    rates.data = _timed(lambda: job.data)
    rates.base = _timed(lambda: job.base)
    with _peak(job, rates, "training"):
        _probe_training(job, rates)
    if job.config.clustering.method == "gradient":
        with _peak(job, rates, "gradients"), lora(job.base, job.config.lora, start=None, seed=job.config.seed) as model:
            _probe_gradients(job, model, rates)
    with _peak(job, rates, "encoder"):
        _probe_encoder(job, rates)
    with _peak(job, rates, "evaluation"):
        _probe_evaluation(job, rates)
    return rates


def _probe_training(job: Job, rates: Rates) -> None:
    from transformers import TrainerCallback

    config, size = job.config, _batch(job)

    class Watch(TrainerCallback):
        """Time and tokens at the end of each step; ends the training when the probe's time is up."""

        def __init__(self) -> None:
            self.marks: list[tuple[float, int]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))
            control.should_training_stop = time.perf_counter() - self.marks[0][0] > PROBE_SECONDS

    watch, start = Watch(), time.perf_counter()
    samples = _training_order(job.data.fit, size, config.seed)
    with TemporaryDirectory() as folder, lora(job.base, config.lora, start=None, seed=config.seed) as model:
        rates.dimension = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train_adapter(
            model, samples, config.training, epochs=1, seed=config.seed, pad_token_id=padding_id(job.tokenizer),
            label="probe", in_order=True, callbacks=[watch],
        )  # fmt: skip
        save_adapter(model, Path(folder) / "adapter")
        save_tokenizer(job.tokenizer, Path(folder) / "tokenizer", job.template.jinja)
        rates.adapter_bytes = _size(Path(folder) / "adapter")
        rates.tokenizer_bytes = _size(Path(folder) / "tokenizer")
    wall = time.perf_counter() - start
    (first, tokens_before), (last, tokens_after) = watch.marks[0], watch.marks[-1]
    # The first step, of the longest batch, warms up; with a single one it is all there is.
    if len(watch.marks) > 1:
        rates.step_token = (last - first) / (tokens_after - tokens_before)
        rates.training = max(0.0, wall - (last - first) - rates.step_token * tokens_before)
    else:
        rates.step_token = wall / tokens_after


def _probe_gradients(job: Job, model: PeftModel, rates: Rates) -> None:
    import torch

    from gradientspace.gradients import PerSampleGradients

    config, data = job.config, job.data
    wanted = min(len(data.validation), max(_VALIDATION_PROBE, config.clustering.n_components, _clusters(job)))
    order: dict[str, Any] = {"max_tokens": config.gradients.max_tokens_per_batch, "seed": config.seed}
    with PerSampleGradients(model) as engine:
        rows = [batch.gradients for batch in engine.stream(data.validation[:wanted], **order)]
        clusterer = new_clusterer(config.clustering, config.seed)
        seconds = _timed(lambda: clusterer.initialize(torch.cat(rows)))
        # The Gram matrix, and with K = auto its random draws, grow with the square of the number of gradients.
        rates.subspace = seconds * (len(data.validation) / wanted) ** 2
        done, start = 0, time.perf_counter()
        for batch in engine.stream(data.fit, **order):
            clusterer.partial_fit(batch.gradients)
            done += sum(len(data.fit[i].input_ids) for i in batch.indices.tolist())
            if time.perf_counter() - start > PROBE_SECONDS:
                break
        rates.gradient_token = (time.perf_counter() - start) / done


def _probe_encoder(job: Job, rates: Rates) -> None:
    prompts = [s.prompt for s in _drawn(job.data.fit, _PROMPTS, job.config.seed)]
    rates.encoder = _timed(lambda: job.encoder.encode(["."]))
    half = len(prompts) // 2
    job.encoder.encode(prompts[half:])
    rates.prompt = _timed(lambda: job.encoder.encode(prompts[:half])) / max(1, half)


def _probe_evaluation(job: Job, rates: Rates) -> None:
    from gradientspace.inference import BASE, Experts

    options = job.config.evaluation
    samples = _drawn(job.evaluated(), options.per_device_eval_batch_size, job.config.seed)
    choice, pad = np.full(len(samples), BASE), padding_id(job.tokenizer)
    with Experts(job.base, []) as base:

        def losses() -> None:
            base.losses(samples, choice, batch_size=options.per_device_eval_batch_size, pad_token_id=pad)

        losses()
        rates.loss_token = _timed(losses) / _tokens(samples)
        if options.exact_match:
            # A batch ends with its longest answer; a trained expert's is about as long as the reference.
            longest = max(len(s.input_ids) - len(s.prompt_ids) for s in samples)
            length = min(longest, options.max_new_tokens)
            prompts = [s.prompt_ids for s in samples]

            def answers() -> None:
                base.generate(
                    prompts, choice, job.tokenizer, batch_size=len(samples), do_sample=False,
                    max_new_tokens=length, min_new_tokens=length,
                )  # fmt: skip

            rates.answer = _timed(answers) / len(samples)


# --------------------------------------------------------------------------- adding up


def add_up(job: Job, rates: Rates) -> list[Estimate]:
    """Estimates of the stages of a run, in their order."""
    config, data, k = job.config, job.data, _clusters(job)
    fit, single = data.fit, job.expert_epochs
    texts = sum(len(m["content"]) for s in (*fit, *held_out(data)) for m in s.messages)  # `rows/` holds them
    stages = [Estimate("data", rates.data, resident_bytes(), texts, f"{len(fit):,} rows to fit")]
    stages.append(_training(job, rates, "warmup", data.warmup, config.warmup.num_train_epochs, base=rates.base))
    stages.append(_clustering(job, rates))
    if config.experts.start == "shared":
        stages.append(_training(job, rates, "shared", fit, job.shared_epochs))
    stages.append(_training(job, rates, f"experts ({k})", fit, single, trainings=k))
    encoded = len(fit) + len(job.calibrated_on())
    stages.append(Estimate("router", rates.prompt * encoded, rates.memory["encoder"], 8 * 400 * k))
    stages.append(_training(job, rates, "single", fit, single))
    routed = rates.prompt * len(held_out(data))
    for name in config.evaluation.baselines:
        stages.append(_baseline(job, rates, name, k, routed if name not in _NOT_ROUTED else 0.0))
        # The encoder remembers the prompts, so that only the first of these baselines pays for them.
        routed = routed if name in _NOT_ROUTED else 0.0
    stages.append(_evaluation(job, rates, k))
    return stages


def _training(
    job: Job, rates: Rates, stage: str, samples: Sequence[Sample], epochs: float, *, trainings: int = 1, base: float = 0
) -> Estimate:
    tokens = _tokens(samples) * epochs
    steps = optimiser_steps(math.ceil(len(samples) / trainings), job.config.training, epochs) * trainings
    saved = trainings * (rates.adapter_bytes + rates.tokenizer_bytes)
    return Estimate(
        stage,
        base + rates.step_token * tokens + rates.training * trainings,
        rates.memory["training"],
        saved,
        f"{steps:,} steps, {tokens:,.0f} tokens",
    )


def _baseline(job: Job, rates: Rates, name: str, k: int, routing: float) -> Estimate:
    """One adapter, or one for each of K groups; `docs/baselines.md` says what each trains."""
    fit, all_epochs = job.data.fit, job.config.training.num_train_epochs
    if name == "single-long":
        return _training(job, rates, name, fit, all_epochs * k - job.shared_epochs)
    if name == "single-wide":
        return _training(job, rates, name, fit, job.expert_epochs)
    if name == "elrea":  # its features are gradients of every sample
        features = rates.gradient_token * sum(map(_tokens, (fit, held_out(job.data))))
        epochs = all_epochs * (1 - job.config.experts.shared_share)
        return _training(job, rates, f"{name} ({k})", fit, epochs, trainings=k, base=features)
    epochs = all_epochs if name == "gradientspace-paper" else job.expert_epochs
    return _training(job, rates, f"{name} ({k})", fit, epochs, trainings=k, base=routing)


def _clustering(job: Job, rates: Rates) -> Estimate:
    config, data = job.config, job.data
    options = config.clustering
    encoded = len(data.fit) * (options.method == "embedding" or options.target == "routable")
    seconds = (rates.encoder + rates.prompt * encoded) if encoded else 0.0
    if options.method != "gradient":
        return Estimate("cluster", seconds, rates.memory["encoder"], 200 * len(data.fit))
    passes = [data.validation, data.fit, held_out(data)] + ([data.fit] if options.settle == "exact" else [])
    seconds += rates.gradient_token * sum(map(_tokens, passes)) + rates.subspace
    plan = new_clusterer(options, config.seed).plan_memory(rates.dimension)
    numbers = rates.dimension * (options.n_components + _clusters(job) + 2)
    table = (len(data.fit) + len(held_out(data))) * (options.n_components + 8)
    return Estimate(
        "cluster", seconds, max(rates.memory["gradients"], resident_bytes() + plan.peak), 4 * (numbers + table),
        f"D = {rates.dimension:,}, {sum(map(len, passes)):,} gradients",
    )  # fmt: skip


def _evaluation(job: Job, rates: Rates, k: int) -> Estimate:
    samples, options = job.evaluated(), job.config.evaluation
    ensembles = [mode for mode in options.inference_modes if mode.endswith("ensemble")]
    baselines = sum(k + 1 if name == "elrea" else 1 for name in options.baselines)
    # Losses of base, single, every baseline, each expert and each ensemble; the other ways to answer look theirs up.
    losses = 2 + baselines + k + k * len(ensembles)
    answers = 3 + baselines + len(options.inference_modes) + (k - 1) * len(ensembles)
    seconds = rates.loss_token * _tokens(samples) * losses
    seconds += rates.answer * len(samples) * answers + rates.prompt * len(samples)
    methods = 3 + len(options.baselines) + len(options.inference_modes)
    disk = len(samples) * (200 + 16 * methods) + 20_000
    return Estimate(
        "evaluation", seconds, rates.memory["evaluation"], disk, f"{len(samples):,} samples, {methods} methods"
    )


# ------------------------------------------------------------------------------- pieces


def _clusters(job: Job) -> int:
    options = job.config.clustering
    return options.undetermined_n_clusters if options.n_clusters == "auto" else int(options.n_clusters)


def _batch(job: Job) -> int:
    return job.config.training.per_device_train_batch_size * job.config.training.gradient_accumulation_steps


def _training_order(samples: Sequence[Sample], size: int, seed: int) -> list[Sample]:
    """Batches as the Trainer draws them, the one with most tokens first (its memory is the peak), then shuffled."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = [len(s.input_ids) for s in samples]
    indices = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(seed))
    batches = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)] or [indices]
    batches.sort(key=lambda batch: -max(lengths[i] for i in batch))
    rest = batches[1:]
    random.Random(seed).shuffle(rest)
    return [samples[i] for batch in [batches[0], *rest] for i in batch]


def _drawn(samples: Sequence[Sample], n: int, seed: int) -> list[Sample]:
    return random.Random(seed).sample(list(samples), min(n, len(samples)))


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(s.input_ids) for s in samples)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def _peak(job: Job, rates: Rates, name: str) -> Iterator[None]:
    """Enter the peak memory of the block: of the GPU where the base is on one, else of this process."""
    import torch

    cuda = job.base.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as memory:
        yield
    rates.memory[name] = torch.cuda.max_memory_allocated() if cuda else memory.peak_bytes


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
