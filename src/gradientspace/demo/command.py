"""`gradientspace demo`: generated data and a base pretrained on the spot, then the same `run` as everybody's."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from gradientspace.cards import LAST_FILE
from gradientspace.config import GradientSpaceConfig
from gradientspace.demo.recipe import RECIPE
from gradientspace.demo.skills import SIZES, Control, write_data
from gradientspace.progress import Progress, say
from gradientspace.run_folder import Run
from gradientspace.tables import render

_METHODS = {
    "base": "base model",
    "single": "single LoRA",
    "random": "random groups",
    "embedding": "embedding clusters",
    "gradientspace": "GradientSpace routed",
    "oracle": "oracle routing",
}


def demo(control: Control, output_dir: Path, *, seed: int, fresh: bool) -> dict[str, Any]:
    """Run the demo, or reuse a finished one, and print what came out. Returns the results."""
    name = "demo" if control == "none" else f"demo-{control}"
    folder = output_dir / name
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if (folder / LAST_FILE).is_file():
        say(f"{folder} is finished already; nothing is run again (start over with --fresh, or make demo FRESH=1)")
    else:
        _run(control, name, output_dir, seed)
    results = json.loads((Run.open(folder).require("evaluation", "demo") / "results.json").read_text())
    print(summary(results, folder))
    return results


def _run(control: Control, name: str, output_dir: Path, seed: int) -> None:
    """Everything on one thread, so that the numbers do not depend on the count of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _pretrain_and_run(control, name, output_dir, seed)
    finally:
        torch.set_num_threads(threads)


def _pretrain_and_run(control: Control, name: str, output_dir: Path, seed: int) -> None:
    from gradientspace.demo.base import BaseSettings, build_base
    from gradientspace.pipeline import run

    assets = output_dir / "demo-assets"
    say("1. a tiny Llama is pretrained on generated text (once; about a minute)")
    with Progress("pretraining", BaseSettings().steps, "step") as progress:
        base = build_base(assets / f"base-seed{seed}", seed, lambda done, total: progress.advance())
    say("2. skills x topics are generated, then the method runs on them")
    data = write_data(assets / f"{control}-seed{seed}", control, seed)
    run(demo_config(name, output_dir, base, data, seed))


def demo_config(name: str, output_dir: Path, base: Path, data: Path, seed: int) -> GradientSpaceConfig:
    """The demo's recipe on generated files; everything it does not name is the package's default."""
    values: dict[str, Any] = copy.deepcopy(RECIPE)
    values |= {"name": name, "output_dir": str(output_dir), "seed": seed}
    values["model"] = {"model_name_or_path": str(base)}
    values["data"] |= {split: [{"path": str(data / f"{split}.jsonl")}] for split in SIZES}
    values["evaluation"]["baselines"] = ["random", "embedding"]
    return GradientSpaceConfig.from_dict(values)


def summary(results: dict[str, Any], folder: Path) -> str:
    """The table, the verdict, where the files are, and what to type next."""
    lines = [
        "Exact match and loss on "
        f"{results['methods']['base']['overall']['n']} test prompts, by skill (the rows' `domain`):",
        "",
        render(*_method_rows(results)),
        "",
        render(*_agreement_rows(results)),
        "",
        *results["verdict"],
        "",
        f"files    {folder}/  (experts/0 … are ordinary PEFT adapters; report.html shows the run)",
        f'next     gradientspace route {folder} "{_example_prompt(folder)}"',
        "         gradientspace run examples/real-mix.yaml   (your own mix: edit data and model there)",
    ]
    return "\n".join(lines)


def _method_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    domains = results["domains"]
    head = [
        "",
        "exact match",
        *(domains if len(domains) > 1 else []),
        "loss",
        *(domains if len(domains) > 1 else []),
    ]
    rows = []
    for name, label in _METHODS.items():
        method = results["methods"].get(name)
        if method is None:
            continue
        parts = [method["overall"], *(method["by_domain"][d] for d in domains if len(domains) > 1)]
        exact = [f"{100 * p['exact_match']:.1f} %" for p in parts]
        rows.append([label, *exact, *(f"{p['loss']:.3f}" for p in parts)])
    return head, rows


def _agreement_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Adjusted Rand of each grouping with the skill and the topic; absent where all rows have the same one."""
    groupings = {"gradient clusters": results["clustering"], **{
        f"{name} {'groups' if name == 'random' else 'clusters'}": g for name, g in results["groupings"].items()
    }}  # fmt: skip
    labels = {"domain": "with skill", "source": "with topic"}
    rows = []
    for name, grouping in groupings.items():
        values = [grouping["agreement"].get(label) for label in labels]
        cells = ["-" if v is None else f"{v['ari']:.2f}" for v in values]
        rows.append([name, str(grouping["n_clusters"]), *cells])
    return ["adjusted Rand", "K", *labels.values()], rows


def _example_prompt(folder: Path) -> str:
    import pyarrow.parquet as pq

    prompt = pq.read_table(folder / "evaluation/samples.parquet", columns=["prompt"])["prompt"][0].as_py()
    return " ".join(prompt.split()).replace('"', "'")
