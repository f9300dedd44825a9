"""What `import gradientspace` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradientspace


def test_every_public_name_is_there_and_documented() -> None:
    for name in gradientspace.__all__:
        assert getattr(gradientspace, name).__doc__, name
    assert set(gradientspace.__all__) <= set(dir(gradientspace))


def test_run_is_the_function_whatever_was_imported_first() -> None:
    code = (
        "import gradientspace.pipeline, gradientspace.run_folder; from gradientspace import run; print(callable(run))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        gradientspace.nope  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, gradientspace; print([m for m in ('torch', 'transformers', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
