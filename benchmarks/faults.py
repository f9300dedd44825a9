"""Kill runs at random instants and at every recorded write, start them again, and compare every byte they leave.

python benchmarks/faults.py --json benchmarks/results/faults.json            # micro and demo: about an hour on one core
python benchmarks/faults.py --only random,writes --json OUT.json             # some of it; the rest of OUT.json stays
python benchmarks/faults.py --quick

A folder's run is killed several times on its way, each kill at an instant drawn from an uninterrupted run's timeline
(a stage, and seconds into it), and started again after each; the finished folder is compared with the uninterrupted
run's, file by file. What may differ is `run_folder.VOLATILE`; the report's pages that show it (`SHOWS_TIMES`) must be
equal, too, once they are made again from the same `stages.json`. No start may make a stage again that was recorded.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gradientspace.files import write_json
from gradientspace.run_folder import SHOWS_TIMES, VOLATILE

HERE = Path(__file__).parent
BEGIN, REPORT = "begin", "report"
_MARKS = (
    (re.compile(r"(\S+) \.\.\."), lambda found: found[1]),  # the report says it here only: fault_server
    (re.compile(r"1\. a tiny Llama .*"), lambda _: "pretraining"),
    (re.compile(r"2\. skills x topics .*"), lambda _: "generation"),
)
_CONTINUED = re.compile(r"continues after step|the online pass goes on after")
_QUOTED_SIGNALS = {"terminate": (signal.SIGTERM, 143, "terminated"), "interrupt": (signal.SIGINT, 130, "interrupted")}


@dataclass
class Ended:
    """How one start of the command ended."""

    status: int
    """Exit code, or minus the signal that ended it."""
    said: list[str]
    marks: list[tuple[str, float]]
    """What it was at, and since how many seconds."""
    seconds: float

    @property
    def stage(self) -> str:
        return self.marks[-1][0]

    @property
    def made(self) -> list[str]:
        return [name for name, _ in self.marks]


@dataclass(frozen=True)
class Instant:
    """`seconds` after the stage has begun; or soon after a later one has, where the stage is behind already."""

    stage: str
    seconds: float


class Server:
    """One `fault_server.py`, which forks the starts."""

    def __init__(self, hash_seed: int) -> None:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM":
                       "false", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, request: dict[str, Any], send: int, at: Instant | None, order: Sequence[str]) -> Ended:
        """Start the command and, where `at` is given, `send` the signal at that instant."""
        said, begun = Path(request["said"]), time.monotonic()
        said.unlink(missing_ok=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        child = int(self._line())
        marks, due = [(BEGIN, 0.0)], None
        while not select.select([self.process.stdout], [], [], 0.002)[0]:
            if at is None:
                continue
            marks = [*marks[:1], *_marks(said, marks, time.monotonic() - begun)]
            due = due if due is not None else _due(at, marks, order)
            if due is not None and time.monotonic() - begun >= due:
                os.kill(child, send)
                at = None
        status = int(self._line())
        marks = [*marks[:1], *_marks(said, marks, time.monotonic() - begun)]
        return Ended(status, said.read_text().splitlines(), marks, time.monotonic() - begun)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _marks(said: Path, known: Sequence[tuple[str, float]], now: float) -> list[tuple[str, float]]:
    """What the command has said it is at; a mark that is not known yet has been reached now."""
    lines = said.read_text(errors="replace").splitlines() if said.exists() else []
    names = [name(found) for line in lines for pattern, name in _MARKS if (found := pattern.fullmatch(line))]
    return [(name, known[i + 1][1] if i + 1 < len(known) else now) for i, name in enumerate(names)]


def _due(at: Instant, marks: Sequence[tuple[str, float]], order: Sequence[str]) -> float | None:
    """When to strike, where that is known yet."""
    for name, since in marks:
        if name == at.stage:
            return since + at.seconds
        if name in order and order.index(name) > order.index(at.stage):
            return since + 0.1 * random.random()
    return None


@dataclass
class Tally:
    """What a campaign did and found."""

    strikes: int = 0
    starts: int = 0
    folders: int = 0
    by_stage: Counter[str] = field(default_factory=Counter)
    continued_within_a_stage: int = 0
    files_compared: int = 0
    bytes_compared: int = 0
    wrong: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "by_stage": dict(self.by_stage.most_common())}


class Subject:
    """A command whose run is struck: the micro configuration or the demo."""

    def __init__(self, name: str, scratch: Path, arguments: list[str], run: str, *, often: bool) -> None:
        self.name, self.scratch, self.arguments, self.run, self.often = name, scratch, arguments, run, often
        self.servers = [Server(seed) for seed in (1, 2)]
        self._started = 0
        self.whole = scratch / "whole"
        self.timeline = self._whole()
        self.order = [name for name, _ in self.timeline]

    def _whole(self) -> list[tuple[str, float]]:
        """The uninterrupted run; what it was at, and for how many seconds."""
        self.whole.mkdir(parents=True)
        ended = self.start(self.whole, at=Instant("never", 0.0), order=["never"])
        assert ended.status == 0, ended.said
        self.seconds = ended.seconds
        times = [since for _, since in ended.marks] + [ended.seconds]
        return [(name, times[i + 1] - times[i]) for i, (name, _) in enumerate(ended.marks)]

    def start(
        self,
        folder: Path,
        *,
        arguments: list[str] | None = None,
        strike: dict[str, Any] | None = None,
        send: int = signal.SIGKILL,
        at: Instant | None = None,
        order: Sequence[str] | None = None,
    ) -> Ended:
        """One start in `folder`; the servers take turns, so that a run goes on under another hash seed."""
        request = {
            "folder": str(folder),
            "arguments": arguments or self.arguments,
            "said": str(folder / "said.txt"),
            "often": self.often,
            "strike": strike,
        }
        self._started += 1
        return self.servers[self._started % len(self.servers)].start(request, send, at, order or self.order)

    def recorded(self, folder: Path) -> set[str]:
        manifest = folder / self.run / "manifest.json"
        return set(json.loads(manifest.read_text())["stages"]) if manifest.exists() else set()

    def finish(self, folder: Path, tally: Tally, what: str) -> None:
        """Compare a finished folder, remove it where it is right, keep it where not."""
        wrong = compare(self.whole / "runs", folder / "runs", tally, [*VOLATILE, *SHOWS_TIMES])
        shutil.copy(self.whole / self.run / "stages.json", folder / self.run / "stages.json")
        ended = self.start(folder, arguments=["report", self.run])
        if ended.status != 0:
            wrong.append(f"report: {ended.said}")
        wrong += compare(self.whole / "runs", folder / "runs", tally, VOLATILE)
        tally.folders += 1
        tally.wrong += [f"{what}: {name}" for name in dict.fromkeys(wrong)]
        if not wrong:
            shutil.rmtree(folder)

    def close(self) -> None:
        for server in self.servers:
            server.close()


def compare(expected: Path, found: Path, tally: Tally, without: Sequence[str]) -> list[str]:
    """Names of files that are missing, too many, or have other bytes."""
    names = [
        {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not str(p).endswith(tuple(without))}
        for root in (expected, found)
    ]
    both = names[0] & names[1]
    tally.files_compared += len(both)
    tally.bytes_compared += sum((expected / name).stat().st_size for name in both)
    different = [name for name in sorted(both) if not filecmp.cmp(expected / name, found / name, shallow=False)]
    return sorted(names[0] ^ names[1]) + different


def instants(subject: Subject, n: int, rng: random.Random, to_a_folder: int) -> list[list[Instant]]:
    """`n` instants spread over the uninterrupted run's time, in rounds of `to_a_folder`, earliest first."""
    total = sum(seconds for _, seconds in subject.timeline)
    times = [(i + rng.random()) / n * total for i in range(n)]
    rng.shuffle(times)
    return [[_instant(subject, t) for t in sorted(times[i : i + to_a_folder])] for i in range(0, n, to_a_folder)]


def _instant(subject: Subject, after: float) -> Instant:
    for name, seconds in subject.timeline:
        if after < seconds:
            return Instant(name, after)
        after -= seconds
    return Instant(*subject.timeline[-1])


def at_random(
    subject: Subject, n: int, rng: random.Random, *, to_a_folder: int, send: int = signal.SIGKILL,
    status: int = -signal.SIGKILL, last_words: str = "",
) -> Iterator[Tally]:  # fmt: skip
    """Strike `n` times at random instants. `status` and `last_words` are how the command has to end then.

    Yields the tally so far after each folder, as the other campaigns do.
    """
    tally = Tally()
    left = instants(subject, n, rng, to_a_folder)
    while left:
        folder, missed = _new(subject.scratch, f"round-{tally.folders}"), []
        for instant in left.pop(0):
            before = subject.recorded(folder)
            ended = subject.start(folder, send=send, at=instant)
            tally.starts += 1
            if ended.status == 0:
                # The run had ended before it could be struck: it is faster now than when its timeline was taken.
                missed.append(Instant(instant.stage, instant.seconds / 2))
                continue
            _note(tally, ended, before, status, last_words)
        if len(missed) == to_a_folder:
            tally.wrong.append(f"none of {to_a_folder} strikes ended a run")
        elif missed:
            left.append(missed)
        _complete(subject, folder, tally, f"round {tally.folders}")
        yield tally


def _note(tally: Tally, ended: Ended, before: set[str], status: int, last_words: str) -> None:
    """One strike: how the command ended, where it was, and whether it had made something again."""
    tally.strikes += 1
    tally.by_stage[ended.stage] += 1
    _note_start(tally, ended, before)
    text = "\n".join(ended.said)
    ends_well = ended.status == status and "Traceback" not in text and "Exception ignored" not in text
    if not ends_well or (last_words and not re.search(last_words, ended.said[-1] if ended.said else "")):
        tally.wrong.append(f"exit {ended.status} in {ended.stage}: {' | '.join(ended.said[-3:])[-400:]}")


def _note_start(tally: Tally, ended: Ended, before: set[str]) -> None:
    tally.continued_within_a_stage += sum(bool(_CONTINUED.search(line)) for line in ended.said)
    tally.wrong += [f"{name} was made again" for name in ended.made if name in before]


def _complete(subject: Subject, folder: Path, tally: Tally, what: str) -> None:
    before = subject.recorded(folder)
    ended = subject.start(folder)
    tally.starts += 1
    _note_start(tally, ended, before)
    if ended.status != 0:
        tally.wrong.append(f"{what}: exit {ended.status}: {' | '.join(ended.said[-3:])}")
        return
    subject.finish(folder, tally, what)


def at_writes(subject: Subject, kind: str, chains: Sequence[int], of: int) -> Iterator[Tally]:
    """Strike at every recorded write of these chains, of `of` that there are: each start at one no start was yet."""
    tally = Tally()
    for chain in chains:
        folder = _new(subject.scratch, f"{kind}-{chain}")
        strike = {"kind": kind, "struck": str(folder / "struck.txt"), "chain": chain, "chains": of}
        while True:
            before = subject.recorded(folder)
            ended = subject.start(folder, strike=strike)
            tally.starts += 1
            if ended.status == 0:
                break
            status, words = (-signal.SIGKILL, "") if kind == "kill" else (2, "error: cannot write to .*disk is full")
            _note(tally, ended, before, status, words)
            if len(tally.wrong) > 20:
                break
        _complete(subject, folder, tally, f"chain {chain}")
        yield tally


def damaged(subject: Subject, rng: random.Random) -> Iterator[Tally]:
    """Damage one file of every stage in three ways: it must be named, and that stage alone made again."""
    tally = Tally()
    folder = _new(subject.scratch, "damaged")
    shutil.copytree(subject.whole / "runs", folder / "runs")
    stages = json.loads((folder / subject.run / "manifest.json").read_text())["stages"]
    for stage, entry in stages.items():
        for harm in (flip_a_bit, cut_in_half, remove):
            name = rng.choice(sorted(entry["files"]))
            harm(folder / subject.run / stage / name, rng)
            ended = subject.start(folder)
            tally.starts, tally.strikes = tally.starts + 1, tally.strikes + 1
            tally.by_stage[stage] += 1
            named = f"{stage}: {name} is missing or damaged (its hash differs); made again" in ended.said
            if ended.status != 0 or not named or ended.made != [BEGIN, stage, REPORT]:
                tally.wrong.append(f"{harm.__name__} {stage}/{name}: exit {ended.status}, made {ended.made}")
    _complete(subject, folder, tally, "damaged")
    yield tally


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut_in_half(path: Path, rng: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def _new(scratch: Path, name: str) -> Path:
    folder = scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# --------------------------------------------------------------------------- the campaigns


def micro_subject(scratch: Path) -> Subject:
    """The tests' micro model and rows, with checkpoints at every chance: seconds a run, every kind of stage."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import conftest

    inputs = _new(scratch, "micro-inputs")
    model = conftest.write_micro_model(inputs / "model")
    for name, rows, seed in (("train", 160, 1), ("test", 16, 2)):
        conftest.write_jsonl(inputs / f"{name}.jsonl", conftest.micro_rows(rows, seed))
    values = conftest.micro_values(model, inputs, "runs")
    values["data"]["n_validation"] = 16
    values["training"] |= {"checkpoint_seconds": 0.0, "per_device_train_batch_size": 4}
    values["gradients"] = {"max_tokens_per_batch": 1024}
    values["evaluation"]["baselines"] = ["embedding"]
    (inputs / "micro.yaml").write_text(yaml.safe_dump(values))
    return Subject("micro", scratch / "micro", ["run", str(inputs / "micro.yaml")], "runs/micro", often=True)


def demo_subject(scratch: Path) -> Subject:
    arguments = ["demo", "--output-dir", "runs"]
    return Subject("demo", scratch / "demo", arguments, "runs/demo", often=False)


def _signals(subject: Subject, name: str, n: int, rng: random.Random) -> Iterator[Tally]:
    number, status, word = _QUOTED_SIGNALS[name]
    words = f"gradientspace: {word}; the same command continues where it stopped"
    return at_random(subject, n, rng, to_a_folder=10, send=number, status=status, last_words=words)


Campaign = Callable[[Subject, random.Random, bool], Iterator[Tally]]
MICRO: dict[str, Campaign] = {
    "random": lambda s, rng, quick: at_random(s, 6 if quick else 200, rng, to_a_folder=3 if quick else 10),
    "writes": lambda s, _, quick: at_writes(s, "kill", [0] if quick else range(4), 100 if quick else 4),
    "terminate": lambda s, rng, quick: _signals(s, "terminate", 2 if quick else 20, rng),
    "interrupt": lambda s, rng, quick: _signals(s, "interrupt", 2 if quick else 20, rng),
    "full": lambda s, _, quick: at_writes(s, "full", [0], 100 if quick else 3),
    "damaged": lambda s, rng, _: damaged(s, rng),
}
DEMO: dict[str, Campaign] = {"demo": lambda s, rng, _: at_random(s, 20, rng, to_a_folder=20)}


def campaigns(wanted: Sequence[str], scratch: Path, quick: bool, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and results of every campaign, after each of its folders."""
    for make, known in ((micro_subject, MICRO), (demo_subject, DEMO)):
        names = [name for name in known if name in wanted]
        if not names:
            continue
        subject = make(scratch)
        for name in names:
            print(f"{name} ({subject.name}, {subject.seconds:.1f} s uninterrupted)", file=sys.stderr, flush=True)
            start = time.monotonic()
            for tally in known[name](subject, random.Random(f"{seed}/{name}"), quick):
                facts = {
                    "subject": subject.name,
                    "uninterrupted_seconds": round(subject.seconds, 1),
                    "stages": len(subject.recorded(subject.whole)),
                    "seconds": round(time.monotonic() - start),
                }
                yield name, {**facts, **tally.to_dict()}
        subject.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help="write the results there; campaigns that are not run stay as they are"
    )
    parser.add_argument("--only", help=f"some of {','.join([*MICRO, *DEMO])}")
    parser.add_argument("--quick", action="store_true", help="a few strikes of the micro run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="keep folders that came out wrong here")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [*MICRO, *({} if options.quick else DEMO)]
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="faults-"))
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"campaigns": {}}
    failed = False
    for name, found in campaigns(wanted, scratch.resolve(), options.quick, options.seed):
        from machine import describe

        results |= {"schema": 1, "machine": describe("transformers", "peft", "safetensors", "pyarrow"),
                    "volatile": list(VOLATILE), "shows_times": list(SHOWS_TIMES)}  # fmt: skip
        results["campaigns"][name] = found
        failed |= bool(found["wrong"])
        print(f"{name}: {found['strikes']} strikes, {found['starts']} starts, {found['files_compared']} files and "
              f"{found['bytes_compared'] / 2**20:.1f} MiB compared, wrong: {found['wrong'] or 'nothing'}")  # fmt: skip
        if options.json:
            write_json(options.json, results)
    if not failed:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
