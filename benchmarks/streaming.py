"""Memory and time of loading a large mix, in memory and with `data.streaming`, each in a process of its own.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json

The rows are made up: words of a fixed vocabulary, about `--tokens` tokens each. `anonymous` is memory that the system
cannot take back (RssAnon of Linux): pages of the mapped file do not count, since they are only borrowed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

from gradientspace.config import DataConfig, SourceConfig

VOCABULARY = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_once(Path(options.load[0]), streaming=options.load[1] == "streaming")))
        return
    n = 2_000 if options.quick else options.rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mix.jsonl"
        write_rows(path, n, options.tokens)
        arms = {
            arm: json.loads(subprocess.check_output([sys.executable, __file__, "--load", str(path), arm], text=True))
            for arm in ("memory", "streaming")
        }
        result = {"rows": n, "file_bytes": path.stat().st_size, "arms": arms, "machine": describe("pyarrow")}
    for arm, values in arms.items():
        print(f"{arm:<10} {values['seconds']:6.1f} s   anonymous {values['anonymous_bytes'] / 2**20:7.0f} MiB "
              f"   peak {values['peak_bytes'] / 2**20:7.0f} MiB")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def write_rows(path: Path, n: int, tokens: int) -> None:
    """`n` rows of words; a word is one token, so that a row has about `tokens` of them."""
    generator = random.Random(0)
    with path.open("w") as file:
        for i in range(n):
            words = [f"w{generator.randrange(VOCABULARY)}" for _ in range(tokens)]
            row = {
                "id": str(i),
                "instruction": " ".join(words[: tokens // 3]),
                "output": " ".join(words[tokens // 3 :]),
            }
            file.write(json.dumps(row) + "\n")


def load_once(path: Path, *, streaming: bool) -> dict[str, Any]:
    """Load the file and say what it took beyond the process before."""
    from gradientspace.data import load
    from gradientspace.memory import PeakMemory

    tokenizer = word_tokenizer()
    with tempfile.TemporaryDirectory() as folder:  # what is imported at first use is no part of the data's memory
        few = Path(folder) / "few.jsonl"
        write_rows(few, 50, 20)
        load(DataConfig([SourceConfig(str(few))], streaming=True), tokenizer, 0)
    before = anonymous_bytes()
    start = time.perf_counter()
    with PeakMemory() as memory:
        data = load(DataConfig([SourceConfig(str(path))], max_length=4096, streaming=streaming), tokenizer, 0)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "anonymous_bytes": anonymous_bytes() - before,
        "peak_bytes": memory.peak_bytes,
        "fit": len(data.fit),
    }


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
