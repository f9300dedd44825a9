"""The whole method, top to bottom. Each step is a stage of the run folder and a command of the same name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gradientspace import comparison
from gradientspace.baselines import train_baseline
from gradientspace.baselines.adapters import train_single
from gradientspace.baselines.groupings import make_groups as make_baseline_groups
from gradientspace.cards import write_cards
from gradientspace.config import GradientSpaceConfig
from gradientspace.export import check_before_training
from gradientspace.fallback import choose_fallback
from gradientspace.files import write_json
from gradientspace.grouping import Groups, gradient_groups
from gradientspace.job import Job
from gradientspace.models import lora
from gradientspace.progress import begin_step
from gradientspace.ranks import ranks
from gradientspace.report import write_report
from gradientspace.routable import RoutableMap
from gradientspace.router import RidgeHead, Router
from gradientspace.rows import FILE as ROWS_FILE
from gradientspace.rows import write_rows
from gradientspace.run_folder import Run


def run(config: GradientSpaceConfig, until: str = "report", *, lenders: Sequence[Run] = ()) -> Run:
    """Run the method on `config` up to the step `until`; what is already in the run folder is not done again.

    Stages that one of the `lenders` has made from the same inputs and options are taken over from there.
    """
    job = Job(Run.create(config.validate(), lenders))
    with job.run.lock():
        for number, (name, step) in enumerate(STEPS.items()):
            begin_step(number, list(STEPS))
            step(job)
            if name == until:
                break
    return job.run


def read_data(job: Job) -> None:
    """Rows -> tokenised samples with stable ids, every row accounted for."""
    check_before_training(job.config.export.engine, job.config.model, job.config.lora.target_modules)

    def make(folder: Path) -> None:
        write_json(folder / "accounting.json", job.data.accounting)
        write_json(folder / "fingerprint.json", job.data.fingerprint())

    job.run.stage("data", make)
    job.run.stage("rows", lambda folder: write_rows(folder / ROWS_FILE, job.data), inputs=("data",))


def warm_up(job: Job) -> None:
    """Stage I: a small adapter that makes gradients mean something (at initialisation LoRA's B is zero)."""
    options = job.config.warmup
    job.train(
        "warmup", lambda: job.data.warmup, epochs=options.num_train_epochs, start=None, inputs=("data",),
        learning_rate=options.learning_rate,
    )  # fmt: skip


def cluster(job: Job) -> None:
    """Stage II: gradients stream into the clusterer."""

    def make(folder: Path) -> None:
        make_groups(job, folder).write(folder, job.data)

    job.run.stage("clustering", make, inputs=("warmup",), resumable=True)


def make_groups(job: Job, folder: Path) -> Groups:
    options = job.config.clustering
    if options.method != "gradient":
        assert isinstance(options.n_clusters, int)  # the config refuses "auto" here
        return make_baseline_groups(job, options.method, options.n_clusters)
    ranks().order("cluster", job.run)
    with lora(job.base, job.config.lora, start=job.run.path / "warmup", seed=job.config.seed) as model:
        return gradient_groups(model, job.data, job.config, job.encoder, folder)


def train_experts(job: Job) -> None:
    """Stage III: what all samples share is learnt once from all of them, then one expert a cluster starts there."""
    train_shared(job)
    job.train_experts("experts", Groups.read(job.run.path / "clustering"), inputs=("clustering",))


def train_shared(job: Job) -> None:
    if job.config.experts.start == "shared":
        job.train(
            "shared", lambda: job.data.fit, epochs=job.shared_epochs, start=job.run.path / "warmup",
            inputs=("warmup",), served=True,
        )  # fmt: skip


def train_router(job: Job) -> None:
    """An encoder that sees the prompt only, calibrated on rows of dev."""

    def make(folder: Path) -> None:
        groups, dev = Groups.read(job.run.path / "clustering"), job.calibrated_on()
        router = Router(job.encoder, router_head(job), random_state=job.config.seed)
        router.fit(
            [s.prompt for s in job.data.fit], groups.fit,
            [s.prompt for s in dev], groups.held_out[: len(dev)],
        )  # fmt: skip
        if job.config.router.fallback != "none":
            choose_fallback(job, router, folder)
        router.save(folder)

    with_experts = job.run.stages_below("experts") if job.config.router.fallback != "none" else ()
    job.run.stage("router", make, inputs=("clustering", *with_experts))


def router_head(job: Job) -> str | RidgeHead:
    folder = job.run.path / "clustering/routable"
    # With one cluster there is nothing to map, and the router is constant.
    if job.config.router.head == "logistic" or not folder.is_dir():
        return "logistic"
    routable = RoutableMap.load(folder)
    return RidgeHead(routable.coefficients_, routable.centres_)


def evaluate(job: Job) -> None:
    """One adapter on the mix, and every baseline asked for, with the same start and tokens; then all on one table."""
    train_single(job)
    for name in job.config.evaluation.baselines:
        train_baseline(job, name)
    baselines = [f"baselines/{name}" for name in job.config.evaluation.baselines]
    inputs = ("router", "single", *job.run.stages_below("experts", *baselines))
    job.run.stage("evaluation", lambda folder: comparison.evaluate(job, folder), inputs=inputs)


def report(job: Job) -> None:
    """One page that says what came out, and a card beside every expert and the router."""
    write_report(job.run)
    write_cards(job.run)


STEPS: dict[str, Callable[[Job], None]] = {
    "data": read_data,
    "warmup": warm_up,
    "cluster": cluster,
    "experts": train_experts,
    "router": train_router,
    "eval": evaluate,
    "report": report,
}

STAGES_OF: dict[str, tuple[str, ...]] = {
    "data": ("data", "rows"),
    "warmup": ("warmup",),
    "cluster": ("clustering",),
    "experts": ("shared", "experts"),
    "router": ("router",),
    "eval": ("evaluation",),
    "report": (),
}
"""The folders of the run that each step makes."""
