"""Starts `saev` commands and scripts as real processes in milliseconds.

Importing torch takes seconds. A process that has imported everything, and computed nothing, forks:
each child is a process of its own, which runs the command line and may be killed like any other.
"""

import json
import os
import subprocess
import sys
import tempfile
import typing as tp
from collections.abc import Mapping, Sequence
from pathlib import Path

DEADLY = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""Audit events (https://docs.python.org/3/library/audit_events.html) that `die_at` counts: all
that make a name appear or vanish. Each is raised just before it happens."""


class Ended(tp.NamedTuple):
    """How a command ended."""

    status: int
    """Exit status; minus the signal's number if it was killed."""
    stdout: str
    stderr: str


class Forker:
    """Keeps the warm process. Use it as a context manager."""

    def __enter__(self) -> tp.Self:
        self._folder = tempfile.TemporaryDirectory(prefix="saev-forker-")
        self._warm = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # More threads than cores must not spin.
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        if self._ask({"ask": "ready"}) != "yes":
            raise RuntimeError("the warm process did not start")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._warm.stdin is not None
        self._warm.stdin.close()
        self._warm.wait(timeout=60)
        self._folder.cleanup()

    def start(
        self,
        argv: Sequence[object],
        *,
        script: str | None = None,
        die_at: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Run `saev ARGV`, or a script as `python -c SCRIPT ARGV` does; returns the process id.

        Args:
            argv: the command line.
            script: Python code.
            die_at: the process kills itself (SIGKILL) just before its die_at-th deadly event,
                counted from 0.
            env: more environment variables. What is read when torch is imported comes too late.
        """
        # A server of a test may have started after the warm process.
        own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return self._ask(
            {
                "ask": "start", "argv": [str(word) for word in argv], "script": script,
                "die_at": die_at, "env": {**own, **(env or {})},
            }
        )  # fmt: skip

    def wait(self, pid: int) -> Ended:
        """Wait for the end of a process."""
        status = self._ask({"ask": "wait", "pid": pid})
        out, err = (Path(self._folder.name) / f"{pid}.{end}" for end in ("out", "err"))
        # A process that is killed before its first statement has not made its files.
        return Ended(status, *(f.read_text() if f.exists() else "" for f in (out, err)))

    def run(self, argv: Sequence[object], *, die_at: int | None = None) -> Ended:
        """Start a command and wait for its end."""
        return self.wait(self.start(argv, die_at=die_at))

    def output(self, script: str, *argv: object, env: Mapping[str, str] | None = None) -> str:
        """What a script prints that must succeed."""
        ended = self.wait(self.start(argv, script=script, env=env))
        assert ended.status == 0, ended.stderr
        return ended.stdout

    def _ask(self, question: dict[str, tp.Any]) -> tp.Any:
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.write(json.dumps({**question, "folder": self._folder.name}) + "\n")
        self._warm.stdin.flush()
        line = self._warm.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm process ended with status {self._warm.wait()}")
        return json.loads(line)


def _answer() -> None:
    """The warm process: one JSON question a line on stdin, one JSON answer a line on stdout."""
    import open_clip  # noqa: F401
    import pyarrow
    import s3fs  # noqa: F401
    import timm  # noqa: F401

    from saev import cli, inference, train, visuals  # noqa: F401
    from saev.shards import extract  # noqa: F401

    pyarrow.array([0])  # imports pandas, if it is there

    for line in sys.stdin:
        question = json.loads(line)
        answer: tp.Any = "yes"
        if question["ask"] == "start":
            answer = os.fork()
            if answer == 0:
                _child(question)
        elif question["ask"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(question["pid"], 0)[1])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _child(question: dict[str, tp.Any]) -> tp.NoReturn:
    import signal

    from saev import cli

    os.environ.update(question["env"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for descriptor, end in ((1, "out"), (2, "err")):
        path = f"{question['folder']}/{os.getpid()}.{end}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if question["die_at"] is not None:
        left = question["die_at"]

        def count(event: str, _args: tuple) -> None:
            nonlocal left
            if event in DEADLY:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    status = 0
    try:
        if question["script"] is None:
            cli.main(question["argv"])
        else:
            sys.argv = ["-c", *question["argv"]]
            exec(compile(question["script"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as err:
        status = err.code if isinstance(err.code, int) else int(err.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _answer()
