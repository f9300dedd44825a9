"""The run folder: atomic stages, a manifest with hashes, resume, a lock.

A stage writes into `<folder>.partial`, which is renamed when complete and then entered in `manifest.json` with the
SHA-256 of every file. A process killed at any instant therefore leaves either a complete, recorded stage or
nothing that a later start would use. Files whose content changes from run to run (times, memory) live apart, in
`VOLATILE`; everything else is the same bytes for the same config, data and machine, except what the report draws of
the times (`SHOWS_TIMES`). Every start compares a finished stage's files with their hashes before it uses them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.doctor import versions
from gradientspace.errors import RunFolderError
from gradientspace.files import (
    clear,
    digest,
    explain_os_errors,
    hashes,
    own_file,
    plain_json,
    sha256,
    sync,
    write_json,
    write_text,
)
from gradientspace.memory import PeakMemory, return_free_memory
from gradientspace.progress import say
from gradientspace.sharing import link_folder, options_read
from gradientspace.strict import differences

VOLATILE = ("stages.json", ".lock")
"""Seconds and peak memory of every stage; the lock."""
SHOWS_TIMES = ("report.html", "figures/cost.svg", "figures/cost.png", "figures/cost.csv")
"""Drawn from `stages.json` among others: the same bytes where that is the same."""
_AT_START = frozenset({".lock", "versions.json", ".versions.json.tmp", ".config.yaml.tmp"})
"""What a start leaves that was killed before it wrote `config.yaml`."""
CHECKPOINTS = "checkpoints"
"""Folder in a resumable stage's partial one in which an interrupted attempt leaves what the next goes on from."""
SCHEMA = 1
_LARGE = 64 * 2**20
"""Bytes; a stage that took less leaves no free memory behind that were worth looking for."""


class Run:
    """One run folder. Create it with `Run.create(config)` or open an existing one with `Run.open(path)`."""

    def __init__(self, path: Path, config: GradientSpaceConfig, lenders: Sequence[Run] = ()) -> None:
        self.path = path
        self.config = config
        self.lenders = lenders

    @classmethod
    def create(cls, config: GradientSpaceConfig, lenders: Sequence[Run] = ()) -> Run:
        """The run folder of `config`, new or continued. Raises `RunFolderError` if it belongs to another config.

        A stage that one of the `lenders` has made from the same inputs and options is taken over from there.
        """
        path = config.run_folder
        run = cls(path, config, lenders)
        with explain_os_errors(path):
            if not (path / "config.yaml").is_file():
                run._begin()
        different = differences(_identity(load_config(path / "config.yaml")), _identity(config))
        if different:
            raise RunFolderError(
                f"{path} belongs to another config ({'; '.join(different[:3])}"
                f"{'; …' if len(different) > 3 else ''}): choose another --name or remove the folder"
            )
        return run

    def _begin(self) -> None:
        """Write config and versions into a new folder; of two processes that begin at once, one does."""
        if self.path.exists() and {p.name for p in self.path.iterdir()} - _AT_START:
            raise RunFolderError(f"{self.path} exists and is not a run folder: choose another --name")
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock():
            if not (self.path / "config.yaml").is_file():
                write_json(self.path / "versions.json", versions())
                write_text(self.path / "config.yaml", _config_header() + self.config.to_yaml())

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run folder. Raises `RunFolderError` if there is none."""
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{path} is not a run folder (no config.yaml): start one with `gradientspace run`")
        config = load_config(path / "config.yaml")
        # The folder may have been moved or copied; where it lies now is what counts.
        config.name, config.output_dir = path.resolve().name, str(path.parent)
        return cls(path, config)

    # ------------------------------------------------------------------ stages

    def stage(
        self,
        name: str,
        make: Callable[[Path], Any],
        *,
        inputs: tuple[str, ...] = (),
        resumable: bool = False,
        again: bool = False,
    ) -> Path:
        """Make the stage `name` (a folder below the run) with `make(partial_folder)`, unless it is there already.

        A recorded stage is used only if its inputs are the ones it was made from and its files still have their
        recorded hashes; a damaged one is named and made again. With `again` it is made in any case, and `make` may read
        the old folder, which stands until the new one is complete. Returns the stage's folder.

        With `resumable`, `make` finds the folder `CHECKPOINTS` of an attempt that did not end; it decides whether that
        fits, and removes it.
        """
        target = self.path / name
        fingerprint = self.fingerprint(inputs)
        if not again and (self._is_usable(name, fingerprint) or self._take_over(name, fingerprint)):
            return target
        partial = target.with_name(target.name + ".partial")
        with explain_os_errors(self.path):
            try:
                clear(partial, keep=CHECKPOINTS if resumable else None)
                partial.mkdir(parents=True, exist_ok=True)
                start, memory = time.perf_counter(), PeakMemory()
                say(f"{name} ...")
                with memory:
                    make(partial)
                if memory.grown_bytes > _LARGE:  # looking for free memory takes a noticeable part of a second
                    return_free_memory()
                sync(partial)
                files = hashes(partial)
                clear(target)
                partial.rename(target)
            except BaseException:
                clear(partial, keep=CHECKPOINTS if resumable else None)
                raise
            seconds = time.perf_counter() - start
            # The manifest last: a stage that it names has all that belongs to it.
            self._record_cost(name, {"seconds": round(seconds, 2), "peak_memory_bytes": memory.peak_bytes})
            self._record(name, {"inputs": fingerprint, "files": files})
        say(f"{name} done in {seconds:.1f} s")
        return target

    def has(self, name: str) -> bool:
        return name in self.manifest()["stages"] and (self.path / name).is_dir()

    def is_whole(self, name: str) -> bool:
        """Whether the stage is finished and every file is the one that was recorded."""
        entry = self.manifest()["stages"].get(name)
        return entry is not None and self._damaged(name, entry) is None

    def require(self, name: str, command: str) -> Path:
        """The folder of a finished and undamaged stage. Raises `RunFolderError` naming the command that makes it."""
        if not self.has(name):
            raise RunFolderError(f"{self.path} has no finished {name!r} yet: run `gradientspace {command}` first")
        self.check(name)
        return self.path / name

    def check(self, *names: str) -> None:
        """Raises `RunFolderError` where a file of one of these stages is not the one that was recorded.

        A stage that is not recorded is passed over; a name ending in `/` means every stage below it.
        """
        for name, entry in self.manifest()["stages"].items():
            if name not in names and not name.startswith(tuple(n for n in names if n.endswith("/"))):
                continue
            if (damaged := self._damaged(name, entry)) is not None:
                raise RunFolderError(
                    f"{self.path / name / damaged} is missing or damaged (its hash differs): "
                    f"`gradientspace run {self.path}/config.yaml` makes it again"
                )

    def _damaged(self, name: str, entry: dict[str, Any]) -> str | None:
        """The first file of a stage that does not have its recorded hash."""
        return next((f for f, found in entry["files"].items() if sha256(self.path / name / f) != found), None)

    def forget(self, *names: str) -> None:
        """Drop the record of stages, and of all below them, so that the next start makes them again."""
        manifest = self.manifest()
        manifest["stages"] = {
            stage: entry
            for stage, entry in manifest["stages"].items()
            if not any(stage == name or stage.startswith(name + "/") for name in names)
        }
        write_json(self.path / "manifest.json", manifest)

    def discard_made_from(self, name: str) -> list[str]:
        """Remove every stage that was made from `name`, directly or through another; returns their names."""
        entries = self.manifest()["stages"]
        stale = {name}
        while more := {stage for stage, entry in entries.items() if stale & entry["inputs"].keys()} - stale:
            stale |= more
        made = [stage for stage in entries if stage in stale - {name}]
        self.forget(*made)
        for stage in made:
            shutil.rmtree(self.path / stage, ignore_errors=True)
        return made

    def stages_below(self, *names: str) -> tuple[str, ...]:
        """Recorded stages in the folders `names`, in the order they were made."""
        return tuple(s for s in self.manifest()["stages"] if s.startswith(tuple(f"{name}/" for name in names)))

    def _is_usable(self, name: str, fingerprint: dict[str, str]) -> bool:
        entry = self.manifest()["stages"].get(name)
        if entry is None or not (self.path / name).is_dir():
            return False
        if entry["inputs"] != fingerprint:
            say(f"{name}: what it was made from has changed; made again")
            return False
        if (damaged := self._damaged(name, entry)) is not None:
            say(f"{name}: {damaged} is missing or damaged (its hash differs); made again")
        return damaged is None

    def _take_over(self, name: str, fingerprint: dict[str, str]) -> bool:
        """Link the stage's files from a lender that has the same one; False where nobody has."""
        read = options_read(name, self.config)
        for lender in self.lenders if read is not None else ():
            entry = lender.manifest()["stages"].get(name)
            if (
                entry is None
                or entry["inputs"] != fingerprint
                or options_read(name, lender.config) != read
                or lender._damaged(name, entry) is not None
            ):
                continue
            target = self.path / name
            partial = target.with_name(target.name + ".partial")
            with explain_os_errors(self.path):
                for stale in (partial, target):
                    shutil.rmtree(stale, ignore_errors=True)
                partial.mkdir(parents=True)
                link_folder(lender.path / name, partial)
                partial.rename(target)
                self._record_cost(name, {**lender.costs().get(name, {}), "made_in": lender.path.name})
                self._record(name, entry)
            say(f"{name}: the one of {lender.path.name}")
            return True
        return False

    def fingerprint(self, inputs: tuple[str, ...]) -> dict[str, str]:
        """Hash of each finished stage in `inputs`. Raises `RunFolderError` where one is missing."""
        stages = self.manifest()["stages"]
        missing = [i for i in inputs if i not in stages]
        if missing:
            raise RunFolderError(f"{self.path} lacks the stage {missing[0]!r}: run `gradientspace run` again")
        return {i: digest(stages[i]["files"]) for i in inputs}

    # ---------------------------------------------------------------- manifest

    def manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        if not path.is_file():
            return {"schema": SCHEMA, "config": digest(_identity(self.config)), "stages": {}}
        try:
            manifest = plain_json(path)
            schema = manifest["schema"]
            if schema == SCHEMA:
                manifest["stages"] = {
                    name: entry | {"inputs": dict(entry["inputs"]), "files": dict(entry["files"])}
                    for name, entry in manifest["stages"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunFolderError(f"{path} is damaged: remove it to make every stage again") from error
        if schema != SCHEMA:
            raise RunFolderError(
                f"{path} has schema {schema!r}, and this version of gradientspace reads {SCHEMA}: use the version that "
                f"{self.path / 'versions.json'} names, or start a new run with another --name"
            )
        for name, entry in manifest["stages"].items():
            if not all(_stays_below(inner) for inner in (name, *entry["files"])):
                raise RunFolderError(f"{path} names files outside the run folder: it is damaged, or not to be trusted")
        return manifest

    def _record(self, name: str, entry: dict[str, Any]) -> None:
        with self._recording():
            manifest = self.manifest()
            manifest["stages"][name] = entry
            write_json(self.path / "manifest.json", manifest)

    def _record_cost(self, name: str, cost: dict[str, Any]) -> None:
        with self._recording():
            write_json(self.path / "stages.json", {**self.costs(), name: cost})

    def arrange(self, names: Sequence[str]) -> None:
        """Put finished stages into this order in the manifest, whichever of several processes was first."""
        manifest = self.manifest()
        kept = manifest["stages"]
        if [name for name in kept if name in names] != list(names):
            manifest["stages"] = {name: kept[name] for name in kept if name not in names}
            manifest["stages"] |= {name: kept[name] for name in names}
            write_json(self.path / "manifest.json", manifest)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """The processes of one run enter their stages one after another."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def costs(self) -> dict[str, dict[str, Any]]:
        """Seconds and peak memory of every stage that was made; of none where the file is damaged."""
        path = self.path / "stages.json"
        try:
            found = plain_json(path) if path.is_file() else {}
            return {str(name): dict(cost) for name, cost in found.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            say(f"{path} is damaged: times and memory of the stages so far are lost")
            return {}

    # -------------------------------------------------------------------- lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process works on a run folder. Raises `RunFolderError` if another one does."""
        with explain_os_errors(self.path), open(self.path / ".lock", "w", opener=own_file) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(f"another process is working on {self.path}: wait for it or stop it") from error
            yield


def _stays_below(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def _identity(config: GradientSpaceConfig) -> dict[str, Any]:
    """The config without where the folder lies."""
    return {k: v for k, v in config.to_dict().items() if k not in ("name", "output_dir")}


def _config_header() -> str:
    from gradientspace import __version__

    return f"# Replays this run: gradientspace run config.yaml. Written by gradientspace {__version__}.\n"
