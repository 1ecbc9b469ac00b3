"""Handling of Ctrl-C, SIGTERM and closed pipes.

This module imports nothing that takes time, so that handlers are installed at once.
"""

import contextlib
import os
import signal
import sys
import typing as tp
from collections.abc import Iterator

BROKEN_PIPE = 141
"""Exit status if the reader of the output has gone, as for a process that SIGPIPE ends."""
PERMANENT = 65
"""Exit status of a pipeline's step for failures that a retry cannot help (EX_DATAERR of
sysexits.h)."""


def end_at_once(name: str) -> None:
    """From now on, Ctrl-C and SIGTERM end the process at once, with one line.

    Used while libraries are imported. An exception would be raised inside an import, and some
    libraries would print a traceback. The status is 130 for Ctrl-C and 143 for SIGTERM.

    Args:
        name: name of the command, with which the line begins.
    """

    def end(signum: int, frame: object) -> tp.NoReturn:
        word = "Interrupted" if signum == signal.SIGINT else "Terminated"
        os.write(2, f"{name}: {word} before anything was done.\n".encode())
        os._exit(128 + signum)

    _handle(signal.SIGINT, end)
    _handle(signal.SIGTERM, end)


def unwind() -> None:
    """From now on, Ctrl-C and SIGTERM raise an exception, so that temporary files are deleted and a
    resume point can be written."""
    _handle(signal.SIGINT, signal.default_int_handler)
    _handle(signal.SIGTERM, _exit)


def _handle(signum: signal.Signals, handler: tp.Callable[[int, tp.Any], tp.Any]) -> None:
    if signal.getsignal(signum) != signal.SIG_IGN:  # a shell's background job ignores signals
        signal.signal(signum, handler)


class Terminated(SystemExit):
    """SIGTERM, after :func:`unwind`. Its code is the exit status."""


def _exit(signum: int, frame: object) -> tp.NoReturn:
    raise Terminated(128 + signum)


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """End the process silently if the reader of standard output has gone, as ``head`` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise the interpreter would try to write its buffer at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
