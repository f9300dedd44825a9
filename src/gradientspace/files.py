"""Files written whole or not at all, their hashes, and one clear line where the system refuses to write."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradientspace.errors import RunFolderError

_SEAL = "hashes.json"


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary file beside it, synced, then renamed over it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=own_file) as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except IsADirectoryError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(f"{path} is a folder where a file belongs: remove it") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def plain_json(path: Path) -> Any:
    """JSON as `write_json` writes it. Raises ValueError also where it could not be written again (NaN, half pairs)."""
    value = read_json(path)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hashes(folder: Path) -> dict[str, str | None]:
    """SHA-256 of every file below `folder`, by its path there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p) for p in files}


def seal(folder: Path) -> None:
    """Write the hashes of the files in `folder` beside them, for `is_sealed`."""
    write_json(folder / _SEAL, hashes(folder))


def is_sealed(folder: Path) -> bool:
    """Whether `folder` holds exactly the files it was sealed with."""
    try:
        recorded = read_json(folder / _SEAL)
    except (OSError, ValueError):
        return False
    return recorded == {name: found for name, found in hashes(folder).items() if name != _SEAL}


def sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def clear(folder: Path, keep: str | None = None) -> None:
    """Remove `folder`, but for its sub-folder `keep` where it has one."""
    if folder.is_symlink():
        folder.unlink()  # never what it points to
        return
    if keep is None or not (folder / keep).is_dir() or (folder / keep).is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def own_file(path: str, flags: int) -> int:
    """Opener that never writes through a link: a run folder may be somebody else's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())


_OS_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and start the same command again, finished stages are kept",
    errno.EDQUOT: "the disk quota is used up: free some space and start the same command again",
    errno.EACCES: "no permission to write: choose another --output-dir or change the permissions",
    errno.EPERM: "no permission to write: choose another --output-dir or change the permissions",
    errno.EROFS: "the file system is read-only: choose another --output-dir",
    errno.EFBIG: "a file grew over the limit of the file system or the shell (ulimit -f)",
    errno.ELOOP: "one of its files is a link, and nothing is written through one: remove the link",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another --output-dir",
}


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and its like into one clear line, also where a library wraps the system's error."""
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number in _OS_ERRORS:
            raise RunFolderError(f"cannot write to {path}: {_OS_ERRORS[number]}") from error
        raise


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors and other Rust libraries report "... (os error 28)" in the text only.
    text = str(error)
    for number in _OS_ERRORS:
        if f"os error {number})" in text:
            return number
    return None
