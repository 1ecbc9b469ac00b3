"""Command lines of saev, run as a person would paste them."""

import shlex
import signal

import pytest

from saev import cli


def run(line: str, capsys: pytest.CaptureFixture) -> tuple[str, str]:
    """Run a line in this process; returns standard output and standard error."""
    program, *argv = shlex.split(line)
    assert program == "saev"
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        cli.main(argv)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return capsys.readouterr()
