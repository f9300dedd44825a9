"""Model cards of experts, router and run, from the run's own numbers; and the way to a hub.

Cards are made from files only, at the report step, and lie as `README.md` in `experts/K`, `router` and the run folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from gradientspace.damage import reading
from gradientspace.errors import InputError, RunFolderError
from gradientspace.files import write_text
from gradientspace.inference import expert_folders
from gradientspace.models import public_id
from gradientspace.run_folder import Run

_PUSHED = (
    "README.md", "config.yaml", "manifest.json", "experts/**", "router/**", "shared/**", "single/**",
    "data/accounting.json", "evaluation/results.json",
)  # fmt: skip
"""What of a run folder goes to a hub: no rows of the data, and nothing that only this machine needs."""
LAST_FILE = "README.md"
"""The last file that a finished run writes."""
_NOT_PUSHED = ("*.partial/*", "*/checkpoints/*")


def write_cards(run: Run) -> None:
    """Write the cards of an evaluated run; made anew each time."""
    with reading(run.path, "run it again from the step that made it"):
        facts = _Facts(run)
        cards = {folder / "README.md": expert_card(facts, k) for k, folder in enumerate(facts.folders)}
        cards |= {run.path / "router/README.md": router_card(facts), run.path / LAST_FILE: run_card(facts)}
    for path, text in cards.items():
        if not path.parent.resolve().is_relative_to(run.path.resolve()):
            raise RunFolderError(f"{path.parent} is a link out of the run folder: nothing is written there")
        write_text(path, text)


class _Facts:
    """What the cards say, read from a run folder."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.path.resolve().name
        self.folders = expert_folders(run.path / "experts")
        self.results: dict[str, Any] = json.loads((run.path / "evaluation/results.json").read_text())
        self.trainings = [json.loads((f / "training.json").read_text()) for f in self.folders]
        public = public_id(run.config.model)
        self.base_id = public[0] if public else None
        # Where the base lies on this machine is nobody's business.
        self.base = f"`{self.base_id or Path(run.config.model.model_name_or_path).name}`"
        columns = ["expert", "loss:base", "loss:single", "loss:gradientspace"]
        table = pq.read_table(run.path / "evaluation/samples.parquet", columns=columns)
        self.samples = {name: table[name].to_numpy() for name in columns}

    def front_matter(self, **more: Any) -> str:
        """The block that a hub reads: library, base and tags."""
        from huggingface_hub import ModelCardData

        base = {"base_model": self.base_id} if self.base_id else {}
        return f"---\n{ModelCardData(tags=['gradientspace'], **base, **more).to_yaml()}\n---\n"


def expert_card(facts: _Facts, k: int) -> str:
    """The card of expert k."""
    training, lora = facts.trainings[k], facts.run.config.lora
    total = sum(facts.results["clustering"]["sizes"])
    mine = facts.samples["expert"] == k
    rows = [
        ("base", facts.base),
        ("adapter", f"LoRA, rank {lora.lora_r}, alpha {lora.lora_alpha}, on {_modules(lora.target_modules)}"),
        ("trained on", f"{training['samples']:,} of {total:,} samples, those of cluster {k}"),
        ("their sources", _counts(training["sources"])),
        ("start", _START[facts.run.config.experts.start]),
        ("training", f"{training['steps']:,} steps, {training['tokens']:,} tokens, {training['epochs']:g} epochs, "
                     f"peak learning rate {training['learning_rate']:g}"),
    ]  # fmt: skip
    if training["domains"]:
        rows.insert(4, ("their labels (to judge by, never trained on)", _counts(training["domains"])))
    return "\n".join([
        facts.front_matter(library_name="peft", pipeline_tag="text-generation"),
        f"# Expert {k} of {len(facts.folders)} of `{facts.name}`",
        "",
        f"One of several LoRA adapters, each trained on samples {_GROUPED[facts.run.config.clustering.method]}. A "
        "router sends every prompt to one of them; alone, this one is meant for prompts like those it was trained on.",
        "",
        *_table(("", ""), rows),
        "",
        "## Results",
        "",
        *_routed_here(facts, mine),
        "",
        "Its loss on all held-out prompts, by label, beside the base and one adapter trained on everything:",
        "",
        *_by_domain(facts, k),
        "",
        *_limits_and_use(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base_id or "path/to/the/base"}")',
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")  # with the template of the training',
        ),
    ])  # fmt: skip


def router_card(facts: _Facts) -> str:
    """The card of the router."""
    router, config = facts.results["router"], facts.run.config.router
    metrics = [(name.replace("_", " "), f"{value:.4f}") for name, value in router.items() if _is_number(value)]
    return "\n".join([
        facts.front_matter(pipeline_tag="text-classification"),
        f"# Router of `{facts.name}`",
        "",
        f"Sends a prompt to one of {len(facts.folders)} experts. It reads the prompt only: a frozen sentence encoder "
        f"(`{config.encoder_name_or_path}`) with a {config.head} head, its probabilities calibrated on held-out rows.",
        "",
        f"On {len(facts.samples['expert']):,} held-out prompts (`{facts.results['split']}`); accuracy is agreement "
        "with the cluster of the sample's own gradient, regret and gap are in nats:",
        "",
        *_table(("", "value"), metrics),
        "",
        *_limits_and_use(
            "from gradientspace import Router",
            "",
            'Router.load("path/to/this/folder").predict_proba(["a prompt"])',
        ),
    ])  # fmt: skip


def run_card(facts: _Facts) -> str:
    """The card of the whole: experts, router and what they are worth together."""
    methods = facts.results["methods"]
    rows = [
        (name, f"{m['overall']['loss']:.4f}", *([f"{m['overall']['exact_match']:.4f}"] if _matched(methods) else []))
        for name, m in methods.items()
    ]
    head = ("method", "loss", *(["exact match"] if _matched(methods) else []))
    return "\n".join([
        facts.front_matter(library_name="peft", pipeline_tag="text-generation"),
        f"# `{facts.name}`: {len(facts.folders)} LoRA experts and their router",
        "",
        f"Made with [GradientSpace](https://arxiv.org/abs/2512.06678) from {facts.base}: one expert for each group of "
        f"samples {_GROUPED[facts.run.config.clustering.method]}, and every prompt is answered by one.",
        "",
        f"On {len(facts.samples['expert']):,} held-out prompts (`{facts.results['split']}`), every trained method "
        "from the same start:",
        "",
        *_table(head, rows),
        "",
        *facts.results["verdict"],
        "",
        "`experts/` are ordinary PEFT adapters, `router/` says which one a prompt goes to, `config.yaml` replays all.",
        "",
        *_limits_and_use(
            "from gradientspace import RoutedModel",
            "",
            'RoutedModel.from_run("path/to/this/folder").generate("a prompt")',
        ),
    ])  # fmt: skip


def push_to_hub(run: Run, repo_id: str, *, private: bool = False) -> str:
    """Upload experts, router, cards and results of an evaluated run; never its data. Returns the address.

    Raises `RunFolderError` where the run is not evaluated or is damaged, `InputError` where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    run.require("evaluation", f"eval {run.path}")
    run.check("experts/", "router", "shared", "single")
    write_cards(run)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=run.path,
            allow_patterns=list(_PUSHED),
            ignore_patterns=list(_NOT_PUSHED),
            commit_message=f"GradientSpace run {run.path.resolve().name}",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot push to {repo_id}: {reason} (log in with `hf auth login`)") from error
    return str(url)


# ----------------------------------------------------------------------------- pieces of text

_START = {
    "shared": "an adapter trained on all samples for a part of the budget (`shared/`)",
    "warmup": "the warm-up adapter",
    "fresh": "a fresh adapter",
}
_GROUPED = {
    "gradient": "whose gradients pull the base the same way",
    "embedding": "whose prompts are about the same",
    "tfidf": "whose prompts share words",
    "source": "of one source",
    "random": "grouped by chance",
}


def _limits_and_use(*code: str) -> list[str]:
    return [
        "## Limits",
        "",
        "Trained and judged on the data named in `config.yaml` only, with one seed. Nothing here was checked for "
        "safety, bias or licence: those of the base and of the data apply.",
        "",
        "## Use",
        "",
        "```python",
        *code,
        "```",
        "",
    ]


def _routed_here(facts: _Facts, mine: np.ndarray) -> list[str]:
    if not mine.any():
        return [f"No prompt of {len(mine):,} held-out ones (`{facts.results['split']}`) was routed to this expert."]
    losses = {name: float(facts.samples[f"loss:{name}"][mine].mean()) for name in ("base", "single", "gradientspace")}
    return [
        f"Of {len(mine):,} held-out prompts (`{facts.results['split']}`), {int(mine.sum()):,} were routed here. Their "
        f"mean loss is {losses['gradientspace']:.4f} nats; {losses['single']:.4f} with one adapter trained on "
        f"everything, {losses['base']:.4f} with the base.",
    ]


def _by_domain(facts: _Facts, k: int) -> list[str]:
    methods = facts.results["methods"]
    rows = [
        (domain, f"{losses[k]:.4f}", *(f"{methods[m]['by_domain'][domain]['loss']:.4f}" for m in ("single", "base")))
        for domain, losses in facts.results["experts"]["loss_by_domain"].items()
    ]
    return _table(("label", "this expert", "one adapter", "base"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _counts(counts: dict[str, int]) -> str:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{' '.join(name.split())} {n:,}" for name, n in shown[:12]) + (", …" if len(shown) > 12 else "")


def _modules(target_modules: str | list[str]) -> str:
    return target_modules if isinstance(target_modules, str) else ", ".join(target_modules)


def _matched(methods: dict[str, Any]) -> bool:
    return "exact_match" in methods["base"]["overall"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
