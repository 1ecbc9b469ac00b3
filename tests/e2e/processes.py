"""Children that end-to-end tests start: free ports, waiting until they answer, ending them."""

import contextlib
import signal
import socket
import ssl
import subprocess
import time
import typing as tp
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

_START_SECONDS = 180  # two busy cores need most of a minute for an API server
_STOP_SECONDS = 20


class Child(tp.NamedTuple):
    """A running process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    """What it prints."""


@contextlib.contextmanager
def child(
    command: list[tp.Any], folder: Path, env: dict[str, str] | None = None
) -> Iterator[Child]:
    """A process that gets SIGTERM when the block ends; its output is in ``folder``.

    It sees none of the caller's environment but ``env``: no proxy, credential or setting of the
    machine may change what a test finds.
    """
    name = Path(command[0]).name
    log = folder / f"{name}.log"
    minimal = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command], env={**minimal, **(env or {})}, stdout=out, stderr=out
        )
    try:
        yield Child(name, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(ready: Callable[[], bool], started: Child) -> None:
    """Return once ``ready`` holds. Raises RuntimeError if the process ends or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        status = started.process.poll()
        if status is not None:
            raise RuntimeError(f"{started.name} ended with status {status}:\n{_tail(started.log)}")
        if ready():
            return
        time.sleep(0.1)
    raise RuntimeError(
        f"{started.name} was not ready within {_START_SECONDS} s:\n{_tail(started.log)}"
    )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def answers(url: str, *, ca: Path | None = None, token: str = "", any_status: bool = False) -> bool:
    """Whether a GET succeeds (or, with ``any_status``, whether there is an answer at all)."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        context = ssl.create_default_context(cafile=ca) if ca else None
        urllib.request.urlopen(request, timeout=5, context=context).close()
    except urllib.error.HTTPError:
        return any_status
    except OSError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on at ``host``."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
