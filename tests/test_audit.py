"""The audit says what it found, and never that all is well where it could not ask."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/audit.py"


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (program("import sys; sys.exit('ConnectionError: no route')"), "no route"),
        (program("pass"), "without a word"),
        (["no-such-program-here"], "not installed"),
    ],
)
def test_what_cannot_be_asked_is_said(
    audit: Any, command: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = audit.audit(SCRIPT, seconds=1, command=command)
    assert line in found
    monkeypatch.setattr(audit, "audit", lambda *_, **__: found)
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    assert audit.main() == audit.UNREACHABLE
    captured = capsys.readouterr()
    assert "nothing was checked" in captured.err
    assert not captured.out


def test_findings_are_listed(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    answer = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]},
            {"name": "b", "version": "3", "vulns": []},
        ]
    }
    found = audit.audit(SCRIPT, seconds=1, command=program(f"print({json.dumps(answer)!r})"))
    monkeypatch.setattr(audit, "audit", lambda *_, **__: found)
    monkeypatch.setattr(sys, "argv", ["audit.py", "--json", str(tmp_path / "audit.json")])
    assert audit.main() == audit.FOUND
    assert "a 1: CVE-1, fixed in 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_text()) == answer
