"""Starts `saev` commands and scripts as real processes in milliseconds.

Importing torch takes seconds. A process that has imported everything, and computed nothing, forks:
each child is a process of its own, which runs the command line and may be killed like any other.
Test processes that run side by side share one such process: it forks a helper for each of them.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
import typing as tp
from collections.abc import Mapping, Sequence
from pathlib import Path

# More threads than cores must not spin.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

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
    """A helper that starts commands. Use it as a context manager.

    Args:
        shared: a folder; who names the same one shares the process that imports everything. None
            shares with nobody.
    """

    def __init__(self, shared: Path | None = None):
        self._shared = shared

    def __enter__(self) -> tp.Self:
        self._folder = tempfile.TemporaryDirectory(prefix="saev-forker-")
        self._helper = self._join(self._shared or Path(self._folder.name))
        return self

    def __exit__(self, *exc: object) -> None:
        self._helper.close()
        self._folder.cleanup()

    def _join(self, folder: Path) -> tp.TextIO:
        """A helper of the warm process, which is started if it does not run."""
        with (folder / "forker.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two tests do not start two of them
            with contextlib.suppress(OSError):
                return _connect(folder / "forker.sock")
            (folder / "forker.sock").unlink(missing_ok=True)  # of one that has ended
            _start_warm_process(folder / "forker.sock")
            return _connect(folder / "forker.sock")

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
            env: environment variables, besides those of this process. What is read when torch is
                imported comes too late.
        """
        return self._ask(
            {
                "ask": "start", "argv": [str(word) for word in argv], "script": script,
                "die_at": die_at, "env": {**os.environ, **THREADS, **(env or {})},
                "cwd": str(Path.cwd()),
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
        self._helper.write(json.dumps({**question, "folder": self._folder.name}) + "\n")
        self._helper.flush()
        line = self._helper.readline()
        if not line:
            raise RuntimeError("the process that starts commands has ended")
        return json.loads(line)


def _connect(place: Path) -> tp.TextIO:
    """A conversation with a new helper. Raises OSError if nobody listens, or has just ended."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(place))
        helper = connection.makefile("rw")
        if helper.readline() != "ready\n":
            raise ConnectionError("the warm process has ended")
        return helper
    finally:
        connection.close()  # the file keeps it open


def _start_warm_process(place: Path) -> None:
    """Returns when it listens; it ends by itself when nobody needs it any more."""
    warm = subprocess.Popen(
        [sys.executable, __file__, str(place)],
        stdout=subprocess.PIPE,
        env=os.environ | THREADS,
        cwd=Path(__file__).parents[1],  # where it begins may be a folder of a test
    )
    assert warm.stdout is not None
    with warm.stdout:
        listens = warm.stdout.readline()
    warm.wait()
    if not listens:
        raise RuntimeError("the warm process did not start; its error stands above")


def _serve(place: str) -> None:
    """The warm process: forks a helper for everybody who connects."""
    if os.fork():
        os._exit(0)  # it is no child of whoever started it, who may end first

    import open_clip  # noqa: F401
    import pyarrow
    import s3fs  # noqa: F401
    import timm  # noqa: F401

    from saev import cli, inference, train, visuals  # noqa: F401
    from saev.shards import extract  # noqa: F401
    from saev.train import worker  # noqa: F401

    pyarrow.array([0])  # imports pandas, if it is there

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    listener.settimeout(0.2)
    print("listening", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    helpers: set[int] = set()
    was_needed = False
    while helpers or not was_needed:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            pid = os.fork()
            if not pid:
                listener.close()
                connection.setblocking(True)
                _help(connection)
                os._exit(0)
            connection.close()
            helpers.add(pid)
            was_needed = True
        helpers -= {pid for pid in helpers if os.waitpid(pid, os.WNOHANG)[0]}
    os._exit(0)  # taking torch down would take long


def _help(connection: socket.socket) -> None:
    """One JSON question a line, one JSON answer a line, until there is nobody to ask."""
    lines = connection.makefile("rw")
    lines.write("ready\n")
    lines.flush()
    for line in lines:
        question = json.loads(line)
        answer: tp.Any
        if question["ask"] == "start":
            answer = os.fork()
            if answer == 0:
                os.close(connection.detach())
                _child(question)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["pid"], 0)[1])
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


class _Fork:
    """What `subprocess.Popen` is for `python -m MODULE`: a fork, which need not import anything."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **_pipes: object):
        theirs_in, mine_in = os.pipe()
        mine_out, theirs_out = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _become(command[command.index("-m") + 1], theirs_in, theirs_out, env)
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(mine_in, "wb"), os.fdopen(mine_out, "rb")
        self._status: int | None = None

    def poll(self, how: int = os.WNOHANG) -> int | None:
        if self._status is None and (found := os.waitpid(self.pid, how))[0]:
            self._status = os.waitstatus_to_exitcode(found[1])
        return self._status

    def wait(self) -> int | None:
        return self.poll(0)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(module: str, stdin: int, stdout: int, env: Mapping[str, str]) -> tp.NoReturn:
    """Run a module in this fork as a new interpreter would, in a session of its own."""
    try:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.getLogger().handlers.clear()
        os.environ.clear()
        os.environ.update(env)
        importlib.import_module(module).main()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        os._exit(1)


def _child(question: dict[str, tp.Any]) -> tp.NoReturn:
    from saev import cli
    from saev.train import launch

    # Ranks of `saev train`, each of which would import torch for seconds. Those that tests start
    # in their own process (tests/train/test_ranks.py) are started as they always are.
    launch.subprocess = types.SimpleNamespace(Popen=_Fork, PIPE=subprocess.PIPE)  # type: ignore
    # Where a shell starts tests in the background, Ctrl-C is ignored, and this is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(question["env"])
    os.chdir(question["cwd"])
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
    _serve(sys.argv[1])
