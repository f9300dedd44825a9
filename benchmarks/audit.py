"""The versions in constraints.txt against a database of known vulnerabilities, with pip-audit.

    python benchmarks/audit.py --json audit.json

It asks a service on the network and is therefore no test. Exit codes: 0 nothing known, 1 something found, 3 the service
could not be asked, so nothing is known either way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
FOUND, UNREACHABLE = 1, 3


def audit(constraints: Path, *, seconds: int, command: list[str] | None = None) -> dict[str, Any] | str:
    """pip-audit's findings, or one line that says why there are none."""
    command = command or [sys.executable, "-m", "pip_audit"]
    words = [*command, "--requirement", str(constraints), "--no-deps", "--disable-pip", "--format", "json"]
    words += ["--progress-spinner", "off", "--timeout", str(seconds)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20 * seconds)
        return json.loads(done.stdout)
    except FileNotFoundError:
        return "pip-audit is not installed"
    except subprocess.TimeoutExpired:
        return f"no answer within {20 * seconds} s"
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else "pip-audit ended without a word"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="wait seconds for the service, not a minute")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS)
    options = parser.parse_args()
    found = audit(options.constraints, seconds=3 if options.quick else 15)
    if isinstance(found, str):
        print(f"audit: nothing was checked, the vulnerability service cannot be asked: {found[:300]}", file=sys.stderr)
        return UNREACHABLE
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    known = [(d["name"], d["version"], v) for d in found["dependencies"] for v in d.get("vulns", [])]
    for name, version, v in known:
        print(f"{name} {version}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'no version yet'}")
    print(f"audit: {len(found['dependencies'])} packages, {len(known)} known vulnerabilities")
    return FOUND if known else 0


if __name__ == "__main__":
    sys.exit(main())
