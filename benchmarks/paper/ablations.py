"""Ablations of the main table's config, on dev_b: one thing changed at a time, one seed first, more for what moves.

    python benchmarks/paper/ablations.py                     every item, one seed
    python benchmarks/paper/ablations.py k rank --seeds 3    some of them, three seeds
    python benchmarks/paper/ablations.py --list

Each item writes `benchmarks/results/ablations/ITEM.json`. Killed and started again, it goes on: variants are ordinary
runs under `runs/ablations`, and stages that they have in common with each other or with the main table's runs (mostly
warm-up, one adapter and shared adapter) are made once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, describe, write_results

from gradientspace.config import DataConfig, GradientSpaceConfig, SourceConfig, load_config
from gradientspace.data.splits import split_rows
from gradientspace.files import write_text
from gradientspace.run_folder import Run
from gradientspace.study import entries, run_configs, table
from gradientspace.tables import render, study_rows

CONFIG = ROOT / "benchmarks/paper/real-mix.yaml"
# The online clusterer's own options show where its labels are used as they are.
PLAIN = {"clustering.target": "plain"}
NO_BASELINES = {"evaluation.baselines": [], "gradients.projection_dim": 0, "evaluation.inference_modes": ["oracle"]}
BESIDE_EMBEDDING = {"evaluation.baselines": ["embedding"]}
SHARE = "share of the rows"
"""No option: the rows of the mix are parted once, and this share of those outside dev is trained on."""
WIDTHS = ["plain", "less", "projection-2048", "projection-512"]
ITEMS: dict[str, list[dict[str, Any]]] = {
    "k": [{"clustering.n_clusters": k, **BESIDE_EMBEDDING} for k in (2, 4, 8, 16)],
    "start": [{"experts.start": start} for start in ("shared", "warmup", "fresh")],
    "shared_share": [{"experts.shared_share": share} for share in (0.25, 0.5, 0.75)],
    "target": [{"clustering.target": target} for target in ("routable", "plain")],
    "components": [{"clustering.n_components": q} for q in (16, 64, 256)],
    "ridge": [{"clustering.ridge": ridge} for ridge in ("auto", 1.0, 100.0)],
    "cache": [{**PLAIN, "clustering.cache_size": n} for n in (8, 32, 128)],
    "momentum": [{**PLAIN, "clustering.momentum": m} for m in (0.03, 0.1, 0.3)],
    "update": [{**PLAIN, "clustering.update": rule} for rule in ("svd", "mean", "running")],
    "centring": [{"clustering.center": center} for center in (True, False)],
    "warmup": [{"data.warmup_fraction": share} for share in (0.05, 0.1, 0.2)],
    "validation": [{"data.n_validation": m} for m in (128, 512, 1024)],
    "steps": [{"training.num_train_epochs": epochs, **BESIDE_EMBEDDING} for epochs in (2, 4)],
    "data": [{SHARE: share, **BESIDE_EMBEDDING} for share in (0.1, 0.2, 0.4)],
    "rank": [{"lora.lora_r": r, "lora.lora_alpha": 2 * r} for r in (4, 8, 16)],
    "projection": [{"evaluation.baselines": WIDTHS, "gradients.projection_dim": 8192}],
    "compute": [{"evaluation.baselines": ["single-long"]}],
}


def variants(item: str, config: Path, output_dir: str) -> list[GradientSpaceConfig]:
    """The configs of one item, named by what they change; methods shown beside them name nothing."""
    made = []
    for changes in ITEMS[item]:
        options = {key: value for key, value in {**NO_BASELINES, **changes}.items() if key != SHARE}
        variant = load_config(config, [str(word) for key, value in options.items() for word in (f"--{key}", value)])
        if SHARE in changes:
            fit, dev = (str(Path(output_dir) / "rows" / name) for name in ("fit.jsonl", "dev.jsonl"))
            variant.data.train = [SourceConfig(path=fit, name="mix", weight=changes[SHARE])]
            variant.data.dev = [SourceConfig(path=dev, name="mix")]
        named = {key: value for key, value in changes.items() if key != "evaluation.baselines"}
        variant.name = "-".join([item, *map(str, named.values())]) if named else f"{item}-methods"
        variant.output_dir = output_dir
        made.append(variant)
    return made


def part_rows(mix: Path, folder: Path) -> None:
    """The rows of a mix as fit.jsonl and dev.jsonl: the same dev whatever share of the others is trained on."""
    rows = [json.loads(line) for line in mix.read_text(encoding="utf-8").splitlines()]
    ids, prompts = [row["id"] for row in rows], [f"{row['instruction']}\n{row['input']}" for row in rows]
    parts = split_rows(
        ids, prompts, [None] * len(rows), DataConfig(dev_fraction=0.1), 0, hold_out_test=False, hold_out_dev=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in {"fit": parts.fit, "dev": parts.dev_a + parts.dev_b}.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(rows[i]) + "\n" for i in members))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"default: all of {', '.join(ITEMS)}")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output-dir", default="runs/ablations")
    parser.add_argument("--lenders", nargs="*", default=sorted(ROOT.glob("runs/real-mix-seed*")), metavar="RUN",
                        help="other runs whose stages may be taken; default: the main table's")  # fmt: skip
    parser.add_argument("--json-dir", type=Path, default=RESULTS / "ablations")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:13} {', '.join(map(str, changes))}" for name, changes in ITEMS.items()))
        return
    unknown = [item for item in options.items if item not in ITEMS]
    if unknown:
        parser.error(f"unknown item {unknown[0]!r}: known are {', '.join(ITEMS)}")
    lenders = [Run.open(folder) for folder in options.lenders]
    for item in options.items or ITEMS:
        if item == "data":
            part_rows(Path(load_config(options.config).data.train[0].path), Path(options.output_dir) / "rows")
        asked = variants(item, options.config, options.output_dir)
        runs = run_configs(asked, seeds=options.seeds, split="dev_b", lenders=lenders)
        found = table(entries(runs))
        print(f"\n{item}\n{render(*study_rows(found))}\n")
        write_results(options.json_dir / f"{item}.json", {**found, "item": item, "machine": describe("transformers")})


if __name__ == "__main__":
    main()
