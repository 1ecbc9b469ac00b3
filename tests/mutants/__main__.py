"""Whether tests notice: changes the product in ways that are wrong, and runs the tests of the room.

    python tests/mutants                    # all rooms, half an hour
    python tests/mutants nn --only 12 13    # some mutants of a room

A mutant is a text that stands once in a room of saev/, and what stands there instead. It is killed
when a test fails. Prints a line for each; the exit status is 1 if one lives, or is not found.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing as tp
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""A mutant whose tests take longer is killed, as a hang is noticed."""


class Mutant(tp.NamedTuple):
    """A wrong change."""

    number: int
    old: str
    new: str
    tests: list[str]


def read(room: str) -> list[Mutant]:
    """The mutants of ROOM.txt: under a line of test files, pairs of lines `- old` and `+ new`."""
    found: list[Mutant] = []
    tests: list[str] = []
    old = ""
    for line in (ROOT / "tests" / "mutants" / f"{room}.txt").read_text().splitlines():
        match line[:2]:
            case "@ ":
                tests = shlex.split(line[2:])
            case "- ":
                old = line[2:]
            case "+ ":
                found.append(Mutant(len(found) + 1, old, line[2:], tests))
    return found


def place(room: Path, text: str) -> Path:
    """The one file of a room that holds a text, once."""
    found = [path for path in sorted(room.rglob("*.py")) if text in path.read_text()]
    n = sum(path.read_text().count(text) for path in found)
    if n != 1:
        sys.exit(f"{text!r} stands {n} times in {room.name}, expected once.")
    return found[0]


def copy(folder: Path) -> None:
    """The files of the repository that git knows, below a folder."""
    listed = ["git", "ls-files", "-z", "saev", "pipelines", "components", "tests", "pyproject.toml"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def warm() -> None:
    """Import what is large and is no part of this project; tests run in forked processes."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import s3fs  # noqa: F401
    import torch  # noqa: F401


def fails(folder: Path, tests: list[str]) -> bool:
    """Whether a test fails in the copy."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(folder)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"PYTHONPATH": str(folder), "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        import pytest

        # `make test` alone must find every mutant.
        flags = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
        # pytest's explanation of an assertion that compares megabytes takes minutes.
        flags += ["--assert=plain"]
        os._exit(pytest.main([*flags, *tests]))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1):
                said = (folder / "log").read_text()[-2000:]
                sys.exit(f"pytest ended with status {code}:\n{said}")
            return code == 1
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("rooms", nargs="*", default=["loaders", "nn", "storage"])
    made.add_argument("--only", nargs="*", type=int, help="numbers of mutants")
    args = made.parse_args()
    warm()
    living = 0
    with tempfile.TemporaryDirectory(prefix="saev-mutants-") as temporary:
        folder = Path(temporary)
        copy(folder)
        for name in args.rooms:
            room, mutants = folder / "saev" / name, read(name)
            chosen = [m for m in mutants if not args.only or m.number in args.only]
            for mutant in chosen:
                path = place(room, mutant.old)
                text, start = path.read_text(), time.monotonic()
                path.write_text(text.replace(mutant.old, mutant.new))
                killed = fails(folder, mutant.tests)
                path.write_text(text)
                living += not killed
                verdict = "killed" if killed else "LIVES "
                seconds = time.monotonic() - start
                where = path.relative_to(room)
                print(f"{name} {mutant.number:3} {verdict} {seconds:5.1f} s  {where}: {mutant.new}")
                sys.stdout.flush()
    return int(living > 0)


if __name__ == "__main__":
    sys.exit(main())
