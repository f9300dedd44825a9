"""Files that are not what we wrote, truncated, changed or made up: one line that names the file, and the fix.

Every library has its own words, and its own exceptions, for a file that it cannot make sense of; a JSON value of
another type than ours fails only where it is used. So whatever goes wrong inside `reading` is about the file read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradientspace.errors import GradientSpaceError, InputError, RunFolderError


@contextlib.contextmanager
def reading(path: Path, fix: str, kind: type[InputError] = RunFolderError) -> Iterator[None]:
    """Any failure of the body as a `kind` that names `path`; our own errors pass as they are."""
    try:
        yield
    except GradientSpaceError:
        raise
    except FileNotFoundError as error:
        raise kind(f"{error.filename or path} is missing: {fix}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise kind(f"{path} is damaged ({type(error).__name__}: {reason}): {fix}") from error


def require(holds: Any, what: str) -> None:
    """Inside `reading`: what must hold of a file's contents. Raises ValueError."""
    if not holds:
        raise ValueError(what)
