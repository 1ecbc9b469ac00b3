"""Every `make` command of the client's page is one that the client understands; help; compile."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import dry_make
import pytest
import yaml
from client import Client

from pipelines import arguments, cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cluster-client.md").read_text()
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = sorted(
    {line.split(" #")[0] for block in SHELL for line in re.findall("^make .*", block, re.M)}
)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_understood(command: str, tmp_path: Path) -> None:
    words = cli.spread(dry_make.call(tmp_path, *shlex.split(command)[1:]))
    parsed = cli.parse(words[words.index("pipelines") + 1 :])
    assert isinstance(parsed, arguments.COMMANDS[command.split()[1]])
    for variable in shlex.split(command)[2:]:
        value = variable.split("=", 1)[1]
        if value != "1":
            assert value.split()[0] in repr(parsed)


def test_every_command_is_documented() -> None:
    assert len(COMMANDS) > 10
    for name in arguments.COMMANDS.keys() - {"run-local"}:  # which needs no cluster
        assert f"make {name}" in TEXT


@pytest.mark.parametrize("command", ["", *arguments.COMMANDS])
def test_help_is_quick_and_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage: python -m pipelines" in out
    assert "default: '')" not in out
    words = "submit doctor compile" if not command else "--help"
    assert all(word in out for word in words.split())


def test_help_loads_no_kfp() -> None:
    code = "import sys, pipelines.cli; print({'kfp', 'kubernetes', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_compile_writes_a_pipeline(
    client: Client, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "make image" in client.fails("compile")
    monkeypatch.setenv("SAEV_IMAGE", "registry.test/saev:1")
    assert client.ok("compile").out == "pipeline.yaml\n"
    text = home.joinpath("pipeline.yaml").read_text()
    assert next(yaml.safe_load_all(text))["pipelineInfo"]["name"] == "saev"
    assert client.ok("compile", "--out", "-").out == text
    incoming = client.ok("compile", "--out", "-", "--pipeline", "saev-incoming").out
    assert next(yaml.safe_load_all(incoming))["pipelineInfo"]["name"] == "saev-incoming"
    assert "Cannot write gone/x.yaml: No such file" in client.fails(
        "compile", "--out", "gone/x.yaml"
    )
