"""Runs the client's commands in tests."""

import typing as tp

import pytest

from pipelines import cli


class Result(tp.NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str


class Client:
    """Runs commands as the shell would, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, *argv: str) -> Result:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(argv))
        captured = self._capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    def ok(self, *argv: str) -> Result:
        """A command that must succeed."""
        result = self(*argv)
        assert result.status == 0, result
        return result

    def fails(self, *argv: str) -> str:
        """The one line of a command that must fail and print no result."""
        result = self(*argv)
        assert result.status == 1, result
        assert result.out == ""
        assert "Traceback" not in result.err
        lines = [line for line in result.err.splitlines() if line.startswith("pipelines: error: ")]
        assert len(lines) == 1, result.err
        return lines[0].removeprefix("pipelines: error: ")
