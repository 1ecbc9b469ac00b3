"""Signals before there is anything to tidy up, and readers that go away.

Imports nothing that takes time, so that it is in place from the first moment on.
"""

import contextlib
import os
import signal
import sys
import typing as tp
from collections.abc import Iterator

BROKEN_PIPE = 141
"""Exit status of a process whose output nobody reads, as of one that SIGPIPE ends."""
PERMANENT = 65
"""Exit status of a pipeline's step that would fail again (EX_DATAERR of sysexits.h)."""


def end_at_once(name: str) -> None:
    """From now on, Ctrl-C and SIGTERM end the process with one line, whatever it is importing.

    An exception would surface in the middle of a library's import, and some of them print their
    own traceback then. Ctrl-C ends with status 130, SIGTERM with 143.

    Args:
        name: of the command, which begins the line.
    """

    def end(signum: int, frame: object) -> tp.NoReturn:
        word = "Interrupted" if signum == signal.SIGINT else "Terminated"
        os.write(2, f"{name}: {word} before anything was done.\n".encode())
        os._exit(128 + signum)

    _handle(signal.SIGINT, end)
    _handle(signal.SIGTERM, end)


def unwind() -> None:
    """From now on, Ctrl-C and SIGTERM raise: temporaries go, and a resume point can be written."""
    _handle(signal.SIGINT, signal.default_int_handler)
    _handle(signal.SIGTERM, _exit)


def _handle(signum: signal.Signals, handler: tp.Callable[[int, tp.Any], tp.Any]) -> None:
    if signal.getsignal(signum) != signal.SIG_IGN:  # as in a shell's background job, which stays
        signal.signal(signum, handler)


def _exit(signum: int, frame: object) -> tp.NoReturn:
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Ends the process silently if the reader of standard output goes away, as ``head`` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be written, and complained of, at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
