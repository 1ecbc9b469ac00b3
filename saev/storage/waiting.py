"""Requests that wait for a store: how long they may be silent, and the line that says so.

A request is silent while no byte of it moves, in either direction. After :data:`SILENT_S` it has
failed, and counts as one that the store does not answer: large objects over slow links take as long
as they take. After :data:`QUIET_S` a line says that the store does not answer, also while the
request goes on. One thread looks at all requests of the process.
"""

import contextlib
import contextvars
import logging
import math
import os
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

SILENT_S = 12.0
"""A request that is silent for so long has failed. A `read_timeout` of botocore's replaces it."""
QUIET_S = 4.0
"""Troubles that pass faster are not told."""
PATIENCE_S = 120.0
"""For how long an operation is tried again; SAEV_PATIENCE_S is another number."""
_TELL_EVERY_S = 30.0
_LEAST_S = 1.0
"""A try may be silent for so long, however little patience is left."""

operation: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar(
    "operation", default=("", "")
)
"""URL and verb of what is done, for what is said meanwhile."""
_end: contextvars.ContextVar[float] = contextvars.ContextVar("end", default=math.inf)
"""When the patience with the operation ends (time.monotonic)."""


def patience_s() -> float:
    """For how long an operation is tried again, in seconds."""
    try:
        return float(os.environ.get("SAEV_PATIENCE_S") or PATIENCE_S)
    except ValueError:
        return PATIENCE_S


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """An operation that is given up after some seconds."""
    before = _end.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(before)


def limit_s(usual: float) -> float:
    """For how long a request that begins now may be silent: not longer than patience lasts."""
    left = _end.get() - time.monotonic()
    return usual if left <= 0 else min(usual, max(left, _LEAST_S))


def silent(limit_s: float) -> TimeoutError:
    """The error of a request that was silent for so long."""
    return TimeoutError(f"nothing came for {limit_s:.0f} s")


# --- Requests that are under way -------------------------------------------------------------


class Wait:
    """One request that waits for a store. Made by :func:`waiting`."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.url, self.doing = operation.get()
        self.end = _end.get()
        self.since = time.monotonic()

    def moved(self) -> None:
        """Note that a byte moved."""
        self.since = time.monotonic()

    def pause(self) -> None:
        """Note that the store is not waited for, until :meth:`moved`."""
        self.since = math.inf


@contextlib.contextmanager
def waiting(endpoint: str) -> Iterator[Wait]:
    """A request that is under way; the store counts as silent until the request says otherwise.

    Args:
        endpoint: whom it asks, for the line.
    """
    wait = Wait(endpoint)
    _under_way.add(wait)
    _start_watching()
    try:
        yield wait
    finally:
        _under_way.discard(wait)


_under_way: set[Wait] = set()
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
        for wait in _under_way.copy():
            silent = now - wait.since
            if silent < QUIET_S:
                continue
            about = f", to {wait.doing} {wait.url}" if wait.url else ""
            tell(
                wait.url,
                f"The store at {wait.endpoint} does not answer (nothing came for {silent:.0f} s"
                f"{about}).",
                wait.end,
            )


def _forget() -> None:
    """A forked process has no thread that watches, and none of its parent's requests."""
    global _watcher, _LOCK
    _watcher, _LOCK = None, threading.Lock()
    _under_way.clear()


os.register_at_fork(after_in_child=_forget)


# --- What is said ----------------------------------------------------------------------------

_told: dict[str, float] = {}


def tell(url: str, trouble: str, end: float) -> None:
    """Say what is wrong, while it lasts: once in a while per bucket, not once per thread.

    Args:
        url: of what is waited for.
        trouble: the sentence.
        end: when patience ends (time.monotonic).
    """
    place = "/".join(url.split("/")[:3])
    now = time.monotonic()
    with _LOCK:
        if now - _told.get(place, -_TELL_EVERY_S) < _TELL_EVERY_S:
            return
        _told[place] = now
    again = "" if math.isinf(end) else f" It is tried again for {max(0.0, end - now):.0f} s."
    log.warning("%s%s", trouble, again)
