"""The real Makefile, make and shell, with a stand-in for what they start: it prints its words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ECHO = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def call(folder: Path, *words: str) -> list[str]:
    """The words that the program which ``make WORDS`` starts is given.

    Args:
        folder: an empty one, in which make runs.
        words: target and variables.
    """
    shutil.copy(ROOT / "Makefile", folder)
    for place in (".venv/bin/python", "python", "images/build.sh"):
        stand_in = folder / place
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(ECHO)
        stand_in.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", *words],
        cwd=folder,
        env={**os.environ, "PYTHON": "./python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
