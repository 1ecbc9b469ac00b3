"""The real Makefile, make and shell, with a stand-in for what they start: it prints its words."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
ECHO = f"#!{sys.executable} -IS\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
NOTHING = "#!/bin/sh\n"
"""A stand-in that starts at once, where nobody reads the words."""


def call(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> list[str]:
    """The words that the program which ``make WORDS`` starts is given.

    Args:
        folder: an empty one, in which make runs.
        words: target and variables.
        env: variables of the environment.
    """
    done = run(folder, *words, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(
    folder: Path, *words: str, env: Mapping[str, str] | None = None, program: str = ECHO
) -> subprocess.CompletedProcess[str]:
    """The same, whatever comes of it."""
    shutil.copy(ROOT / "Makefile", folder)
    for place in (
        ".venv/bin/python",
        ".venv-client/bin/python",
        ".venv/bin/ruff",
        ".venv/bin/mypy",
        "python",
        "images/build.sh",
    ):
        stand_in = folder / place
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(program)
        stand_in.chmod(0o755)
    return subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", "-o", "setup-client", *words],
        cwd=folder,
        env={**os.environ, "PYTHON": "./python", **(env or {})},
        capture_output=True,
        text=True,
    )
