"""Requests that wait for a store: their time limits, and the warning that the store is silent.

A request is silent while no byte of it moves, in either direction. There is no limit for a whole
request, because a large object over a slow link takes long. A request fails after
:data:`SILENT_S` seconds of silence. After :data:`QUIET_S` seconds a warning says that the store
does not answer, while the request goes on. One thread watches all requests of the process.
"""

import contextlib
import contextvars
import logging
import math
import os
import threading
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SILENT_S = 12.0
"""Seconds of silence after which a request fails. botocore's `read_timeout` overrides it."""
QUIET_S = 4.0
"""Seconds before the first warning. Shorter faults are not reported."""
PATIENCE_S = 120.0
"""Seconds for which an operation is retried; SAEV_PATIENCE_S overrides it."""
_WARN_EVERY_S = 30.0
_LEAST_S = 1.0
"""The shortest limit of silence, used when the retries are nearly over."""

operation: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar(
    "operation", default=("", "")
)
"""URL and verb of the current operation, for warnings."""
_patience: contextvars.ContextVar["Patience | None"] = contextvars.ContextVar(
    "patience", default=None
)
"""The time limit of the current operation's retries."""


def patience_s() -> float:
    """Seconds for which an operation is retried."""
    try:
        return float(os.environ.get("SAEV_PATIENCE_S") or PATIENCE_S)
    except ValueError:
        return PATIENCE_S


class Patience:
    """The time limit of one operation's retries: some seconds from the start of the first fault.

    The time in which an operation worked does not count, so that an upload which breaks after ten
    minutes is retried. The start of a fault is not known exactly: it is the start of the operation,
    but at most :data:`SILENT_S` before the first failure.

    Args:
        seconds: the limit.
        since: start of the fault (time.monotonic), if it is known before the first failure.
    """

    def __init__(self, seconds: float, since: float | None = None):
        self._seconds = seconds
        self._since = since

    def failed(self, start: float) -> None:
        """Record that the operation, which started at ``start``, has failed."""
        if self._since is None:
            self._since = max(start, time.monotonic() - SILENT_S)

    def end(self, since: float) -> float:
        """When the retries end. Before the first failure, a fault counts from ``since``."""
        return self._seconds + (since if self._since is None else self._since)


@contextlib.contextmanager
def limited(patience: Patience) -> Iterator[None]:
    """Limit the operation in the block, with all its retries."""
    before = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(before)


def limit_s(usual: float) -> float:
    """Seconds of silence allowed for a request that starts now. The retries' end shortens them."""
    patience, now = _patience.get(), time.monotonic()
    left = patience.end(now) - now if patience else math.inf
    return usual if left <= 0 else min(usual, max(left, _LEAST_S))


def silent(limit_s: float) -> TimeoutError:
    """The error of a request that was silent for ``limit_s`` seconds."""
    return TimeoutError(f"nothing came for {limit_s:.0f} s")


# --- Running requests ------------------------------------------------------------------------


class Wait:
    """One request that waits for a store. Made by :func:`waiting`."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.url, self.doing = operation.get()
        self._patience = _patience.get()
        self.since = time.monotonic()

    def moved(self) -> None:
        """Record that a byte moved."""
        self.since = time.monotonic()

    def pause(self) -> None:
        """Record that this process does not wait for the store, until :meth:`moved`."""
        self.since = math.inf

    @property
    def end(self) -> float:
        """When the retries of the operation end, if the request stays silent."""
        return self._patience.end(self.since) if self._patience else math.inf


@contextlib.contextmanager
def waiting(endpoint: str) -> Iterator[Wait]:
    """Watch the request in the block. The store counts as silent until :meth:`Wait.moved`.

    Args:
        endpoint: address of the store, for the warning.
    """
    wait = Wait(endpoint)
    _running.add(wait)
    _start_watching()
    try:
        yield wait
    finally:
        _running.discard(wait)


_running: set[Wait] = set()
_watcher: threading.Thread | None = None
_LOCK = threading.Lock()


def _start_watching() -> None:
    global _watcher
    if _watcher is None:
        with _LOCK:
            if _watcher is None:
                _watcher = threading.Thread(target=_watch, name="saev-waiting", daemon=True)
                _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(max(QUIET_S / 8, 0.02))
        now = time.monotonic()
        for wait in _running.copy():
            silent = now - wait.since
            if silent < QUIET_S:
                continue
            about = f", to {wait.doing} {wait.url}" if wait.url else ""
            warn(
                wait.url,
                f"The store at {wait.endpoint} does not answer (nothing came for {silent:.0f} s"
                f"{about}).",
                wait.end,
            )


def _forget() -> None:
    """Reset the state in a forked process, which has no watching thread and no requests."""
    global _watcher, _LOCK
    _watcher, _LOCK = None, threading.Lock()
    _running.clear()


os.register_at_fork(after_in_child=_forget)


# --- Warnings --------------------------------------------------------------------------------

_warned: dict[str, float] = {}
"""When a bucket was last warned of (time.monotonic)."""


def warn(url: str, fault: str, end: float) -> None:
    """Log a fault that goes on, at most once in 30 s per bucket.

    Args:
        url: the object that is waited for.
        fault: a sentence about it.
        end: when the retries end (time.monotonic).
    """
    place = "/".join(url.split("/")[:3])
    now = time.monotonic()
    with _LOCK:
        if now - _warned.get(place, -_WARN_EVERY_S) < _WARN_EVERY_S:
            return
        _warned[place] = now
    again = "" if math.isinf(end) else f" It is tried again for {max(0.0, end - now):.0f} s."
    logger.warning("%s%s", fault, again)
