"""`saev serve` and `saev open` as commands."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from saev import cli, storage


def start(*argv: str, **env: str) -> subprocess.Popen[str]:
    """A command that serves."""
    return subprocess.Popen(
        [sys.executable, "-m", "saev", *argv, "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        data: bytes = answer.read()
        return data


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_and_ends_by_a_signal(root: str, ending: signal.Signals) -> None:
    command = start("serve", "--root", root) if ending == signal.SIGINT else start("open", root)
    assert command.stdout
    address = command.stdout.readline().strip()
    assert len(json.loads(read(f"{address}api/root"))["saes"]) == 3
    assert b"explorer.js" in read(address)
    command.send_signal(ending)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 0
    assert "Ended." in err
    assert "Traceback" not in err


def test_one_run_is_opened_alone(root: str) -> None:
    run = next(entry.url for entry in storage.list_dir(f"{root}/runs"))
    command = start("open", run)
    assert command.stdout
    found = json.loads(read(f"{command.stdout.readline().strip()}api/root"))
    command.terminate()
    command.communicate(timeout=60)
    assert found["one"]
    assert {sae["run"] for sae in found["saes"]} == {run}


def test_a_port_in_use_is_one_sentence(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", "--root", root, "--port", port, "--no-browser"])
    assert ended.value.code == 1
    assert f"--port {port} on --host 127.0.0.1 cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--root", "/nowhere/at/all"], "There is nothing at /nowhere/at/all."),
        (["--prefix", "a b"], "is no path such as /explorer"),
        (["--behind-proxy", "http://x/"], "is no name of a host"),
        (["--memory-mb", "1"], "memory"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", *flags, "--no-browser"])
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_notes_that_cannot_be_written_are_told(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--root", root, "--notes", str(tmp_path / "file/n.json")])
    assert str(tmp_path / "file") in capsys.readouterr().err
