"""Passes on a few log lines of each pod, with a prefix that says which pod wrote them."""

import logging
import re
import sys
import threading
import time
import typing as tp

from saev.launch.cluster import Cluster

logger = logging.getLogger(__name__)

LAST_LINES = 20
"""How many lines are shown of the log of a failed pod."""
_SECONDS = 25.0
"""Fewest seconds between two lines of one pod. Steps report their progress every 30 s."""
_MOST_WARNINGS = 100
"""Most warnings that are passed on of one pod."""
_SILENCE = 300.0
"""After so many seconds without a line, the connection may be dead, and a new one is made."""
_WARNING = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) |saev: |Traceback ")


class Filter:
    """Chooses lines of one pod: each warning, and one other line every :data:`_SECONDS`.

    Args:
        clock: returns the time in seconds; tests give another one.
    """

    def __init__(self, clock: tp.Callable[[], float] = time.monotonic):
        self._clock = clock
        self._next = clock()
        self._n_warnings = 0

    def passes(self, line: str) -> bool:
        """Whether a line is passed on."""
        if not line.strip():
            return False
        if _WARNING.match(line):
            self._n_warnings += 1
            return self._n_warnings <= _MOST_WARNINGS
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + _SECONDS
        return True


class Logs:
    """Follows the logs of pods, each in a thread of its own.

    Args:
        cluster: where the pods are.
        container: name of the container in each pod.
        write: receives the lines; by default they go to standard error.
    """

    def __init__(
        self, cluster: Cluster, container: str, write: tp.Callable[[str], object] | None = None
    ):
        self._cluster, self._container = cluster, container
        self._write = write or _to_stderr
        self._readers: dict[str, _Reader] = {}

    def attend(self, pods: tp.Mapping[str, str]) -> None:
        """Follow these pods. If a log's connection broke, it is opened again.

        Args:
            pods: name of the pod → prefix of its lines.
        """
        self._readers = {name: reader for name, reader in self._readers.items() if name in pods}
        for name, prefix in pods.items():
            reader = self._readers.setdefault(name, _Reader(self, name, prefix))
            reader.go_on()

    def finish(self, seconds: float = 5.0) -> None:
        """Wait up to some seconds for the last lines of pods that have ended."""
        deadline = time.monotonic() + seconds
        for reader in self._readers.values():
            reader.join(deadline - time.monotonic())

    def last_lines(self, pod: str, prefix: str) -> None:
        """Write the last lines of a log, without choosing among them."""
        try:
            answer = self._cluster.log(
                pod, self._container, tail_lines=LAST_LINES, _request_timeout=(10.0, 60.0)
            )
            text = answer.data.decode("utf-8", "replace")
        except Exception as err:  # the pod may be gone; its status tells the failure without a log
            logger.info("The log of pod %s cannot be read: %s", pod, type(err).__name__)
            return
        for line in text.splitlines():
            self._write(f"{prefix} | {line}")


class _Reader:
    """The log of one pod."""

    def __init__(self, logs: Logs, pod: str, prefix: str):
        self._logs, self._pod, self._prefix = logs, pod, prefix
        self._filter = Filter()
        self._thread: threading.Thread | None = None
        self._heard: float | None = None
        """Time of the last line; None before the first one."""

    def go_on(self) -> None:
        """Start a thread that reads, unless one is running."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, daemon=True, name=self._pod)
            self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the log's end."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))

    def _read(self) -> None:
        options: dict[str, tp.Any] = {}
        if self._heard is not None:
            options["since_seconds"] = max(1, round(time.monotonic() - self._heard))
        try:
            answer = self._logs._cluster.log(
                self._pod,
                self._logs._container,
                follow=True,
                _request_timeout=(10.0, _SILENCE),
                **options,
            )
            for line in _lines(answer):
                self._heard = time.monotonic()
                if self._filter.passes(line):
                    self._logs._write(f"{self._prefix} | {line}")
        except Exception as err:  # the connection broke; `attend` opens it again while the pod runs
            logger.debug("The log of pod %s broke off: %s", self._pod, err)


def _lines(answer: tp.Any) -> tp.Iterator[str]:
    """The lines of a response, as they arrive."""
    rest = b""
    for chunk in answer.stream(amt=None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
