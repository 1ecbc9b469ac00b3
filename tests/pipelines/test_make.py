"""Variables of make are text: what stands in them reaches the command as it is, or not at all."""

import json
import shutil
from pathlib import Path

import dry_make
import pytest

from pipelines import arguments, cli, parameters

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")

CODE = [
    'a"; touch x; echo "',
    "a'; touch x; echo '",
    "$(shell touch x)",
    "$(touch x)",
    "$$(touch x)",
    "`touch x`",
    "${shell touch x}",
    "a; touch x",
    "a && touch x",
    "a | touch x",
    "a\ntouch x",
    "$(eval $(shell touch x))",
    "a #b",
    "*",
    "back\\slash",
]
PLACES = [
    ("submit", "DATASET", "--dataset"),
    ("submit", "CONFIG", "--config"),
    ("submit", "ROOT", "--root"),
    ("submit", "NAME", "--name"),
    ("submit", "PARAMS", "--param"),
    ("schedule", "CRON", "--cron"),
    ("schedule", "MARKER", "--marker"),
    ("unschedule", "NAME", "unschedule"),
    ("status", "RUN", "status"),
    ("logs", "STEP", "--step"),
    ("cancel", "RUN", "cancel"),
    ("doctor", "DATASET", "--dataset"),
    ("run-local", "IMAGE", "--image"),
    ("install", "OVERLAY", "--overlay"),
    ("install", "NAMESPACE", "--namespace"),
    ("uninstall", "DELETE_PVC", "--delete-pvc"),
    ("demo", "DEMO", "--root"),
]


@pytest.mark.parametrize(("target", "variable", "before"), PLACES)
def test_a_variable_is_no_code(target: str, variable: str, before: str, tmp_path: Path) -> None:
    for text in CODE:
        words = dry_make.call(tmp_path, target, f"{variable}={text}")
        assert words[words.index(before) + 1] == text
        assert not (tmp_path / "x").exists(), text


@pytest.mark.parametrize("variable", ["BENCH", "COMPONENTS", "FLAGS", "WAIT", "IMAGE", "WHATEVER"])
def test_other_variables_are_no_code_either(variable: str, tmp_path: Path) -> None:
    target = {"BENCH": "bench", "COMPONENTS": "install", "IMAGE": "image"}.get(variable, "submit")
    for text in CODE:
        dry_make.call(tmp_path, target, f"{variable}={text}")
        assert not (tmp_path / "x").exists(), text


def test_parameters_with_spaces_in_their_json(tmp_path: Path) -> None:
    words = dry_make.call(tmp_path, "submit", 'PARAMS=n_parts=16 node_selector={"gpu": "a100"}')
    command = cli.parse(words[words.index("pipelines") + 1 :])
    assert isinstance(command, arguments.Submit)
    found = parameters.parse(command.job.param)
    assert found.keys() == {"n_parts", "node_selector"}
    assert found["n_parts"] == "16"
    assert json.loads(found["node_selector"]) == {"gpu": "a100"}


def test_flags_are_words_as_in_a_shell(tmp_path: Path) -> None:
    words = dry_make.call(tmp_path, "list", "FLAGS=--n 3 --context 'my own'")
    command = cli.parse(cli.spread(words[words.index("pipelines") + 1 :]))
    assert isinstance(command, arguments.List)
    assert (command.n, command.cluster.context) == (3, "my own")


def test_a_quote_that_is_not_closed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["list", "--flags=--context 'my own"])
    assert ended.value.code == 1
    assert 'FLAGS is "--context \'my own": No closing quotation' in capsys.readouterr().err


def test_variables_of_the_environment_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATASET", "s3://bucket/$(shell touch x)")
    words = dry_make.call(tmp_path, "submit")
    assert words[words.index("--dataset") + 1] == "s3://bucket/$(shell touch x)"
    assert not (tmp_path / "x").exists()
