"""A run of small stages that is struck at every write it records, and ends with the bytes of one that never was.

python tests/toy_run.py kill|full FOLDER prints the number of strikes. Nothing here imports torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path

import faults
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file
from striker import Striker

from gradientspace.config import GradientSpaceConfig
from gradientspace.errors import RunFolderError
from gradientspace.files import is_sealed, read_json, seal, write_json
from gradientspace.run_folder import CHECKPOINTS, Run

MOST = 500


def toy(folder: Path) -> None:
    """Stages that write in every way a run does, one of them going on from checkpoints."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # config.yaml names the output folder: the same one for all
    run = Run.create(GradientSpaceConfig.from_dict({"name": "r", "output_dir": "."}))
    with run.lock():
        run.stage("rows", lambda to: pq.write_table(pa.table({"x": np.arange(500)}), to / "out.parquet"))
        run.stage("steps", step_by_step, inputs=("rows",), resumable=True)
        for k in range(2):
            run.stage(f"experts/{k}", lambda to: save_file({"x": np.ones(9)}, to / "a.safetensors"), inputs=("steps",))
        run.stage("last", lambda to: write_json(to / "out.json", [1]), inputs=("experts/0", "experts/1"))


def step_by_step(to: Path) -> None:
    done = [p for p in (to / CHECKPOINTS).glob("*") if not p.suffix and is_sealed(p)]
    for step in range(max((int(p.name) for p in done), default=0) + 1, 4):
        partial, complete = to / CHECKPOINTS / f"{step}.partial", to / CHECKPOINTS / str(step)
        for stale in (partial, complete):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({"x": np.full(50, step)}, partial / "x.safetensors")
        seal(partial)
        partial.rename(complete)
    save_file(load_file(to / CHECKPOINTS / "3/x.safetensors"), to / "last.safetensors")
    shutil.rmtree(to / CHECKPOINTS)


def in_a_child(folder: Path, kind: str | None) -> int:
    """How a start ended: 0, 2 (one line about the disk), or minus a signal. Without a `kind` nothing strikes it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        if kind:
            Striker(folder, kind=kind, struck=f"{folder}.struck", chain=0, chains=1).install()
        toy(folder)
        code = 0
    except RunFolderError as error:
        code = 2 if "the disk is full" in str(error) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finished(run: Path) -> dict[Path, int]:
    """When each file of a recorded stage was written."""
    manifest = run / "manifest.json"
    stages = read_json(manifest)["stages"] if manifest.exists() else {}
    return {p: p.stat().st_mtime_ns for stage in stages for p in (run / stage).iterdir()}


def main(kind: str, folder: Path) -> int:
    assert in_a_child(folder / "whole", None) == 0
    ends, strikes = {"kill": -9, "full": 2}[kind], 0
    while True:
        before = finished(folder / kind / "r")
        code = in_a_child(folder / kind, kind)
        assert before.items() <= finished(folder / kind / "r").items(), "a finished stage was made again"
        if code != ends or strikes > MOST:
            break
        strikes += 1
    assert code == 0, code
    wrong = faults.compare(folder / "whole/r", folder / kind / "r", faults.Tally(), faults.VOLATILE)
    assert not wrong, wrong
    print(strikes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
