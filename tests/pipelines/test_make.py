"""Variables of make are text: what stands in them reaches the command as it is, or not at all."""

import json
import re
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
    ("show", "RUN", "show"),
    ("logs", "STEP", "--step"),
    ("cancel", "RUN", "cancel"),
    ("doctor", "DATASET", "--dataset"),
    ("run-local", "IMAGE", "--image"),
    ("install", "OVERLAY", "--overlay"),
    ("install", "NAMESPACE", "--namespace"),
    ("uninstall", "DELETE_PVC", "--delete-pvc"),
    ("demo", "DEMO", "--root"),
]


MAKEFILE = (dry_make.ROOT / "Makefile").read_text()
VARIABLES = sorted({*re.findall(r"\$\$\{?([A-Z_]+)", MAKEFILE), "WHATEVER"})
TARGETS = re.findall(r"^([a-z0-9-]+):(?!=).*## ", MAKEFILE, re.MULTILINE)
ORIGINS = pytest.mark.parametrize("origin", ["command line", "environment"])


def call(folder: Path, target: str, origin: str, variables: dict[str, str]) -> list[str]:
    """The words of a target, with its variables from one of two sides."""
    if origin == "environment":
        return dry_make.call(folder, target, env=variables)
    return dry_make.call(folder, target, *(f"{k}={v}" for k, v in variables.items()))


@ORIGINS
@pytest.mark.parametrize("text", CODE)
def test_a_text_is_no_code(text: str, origin: str, tmp_path: Path) -> None:
    words = call(tmp_path, "submit", origin, {"DATASET": text})
    assert words[words.index("--dataset") + 1] == text
    assert not (tmp_path / "x").exists()


@ORIGINS
@pytest.mark.parametrize(("target", "variable", "before"), PLACES)
def test_a_variable_arrives_as_it_is(
    target: str, variable: str, before: str, origin: str, tmp_path: Path
) -> None:
    text = " ".join(CODE)
    words = call(tmp_path, target, origin, {variable: text})
    assert words[words.index(before) + 1] == text
    assert not (tmp_path / "x").exists()


@ORIGINS
@pytest.mark.parametrize("text", ["$(shell touch x)", "`touch x`", *CODE[:2]])
def test_no_variable_of_any_target_is_code(text: str, origin: str, tmp_path: Path) -> None:
    """Whatever becomes of the targets. PYTHON is the program that is run, so it has its own try."""
    assert {"BENCH", "SMALL", "WAIT", "COMPONENTS", "FLAGS", "IMAGE"} <= set(VARIABLES)
    targets = [t for t in TARGETS if t not in ("setup", "interop", "lock", "e2e-servers", "clean")]
    for names in ([name for name in VARIABLES if name != "PYTHON"], ["PYTHON"]):
        given = dict.fromkeys(names, text)
        if origin == "environment":
            dry_make.run(tmp_path, "-k", *targets, env=given, program=dry_make.NOTHING)
        else:
            words = (f"{k}={v}" for k, v in given.items())
            dry_make.run(tmp_path, "-k", *targets, *words, program=dry_make.NOTHING)
        assert not (tmp_path / "x").exists()


@ORIGINS
def test_switches_are_on_or_off(origin: str, tmp_path: Path) -> None:
    def has(target: str, flag: str, **variables: str) -> bool:
        return flag in call(tmp_path, target, origin, variables)

    assert has("bench", "--small", SMALL="1")
    assert not has("bench", "--small", SMALL="")
    assert [has("submit", "--wait", WAIT=value) for value in ("1", "yes", "0", "")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_no_recipe_lets_make_expand_a_variable_of_the_user() -> None:
    """What the Makefile itself sets, by `override`, is all that stands in `$(…)`."""
    own = set(re.findall(r"^override ([A-Z_]+)", MAKEFILE, re.MULTILINE))
    lines = [line for line in MAKEFILE.splitlines() if not line.startswith("#")]
    used = {name for line in lines for name in re.findall(r"(?<!\$)\$[({]([A-Z_]+)[)}]", line)}
    assert used - own - {"MAKEFILE_LIST"} == set()


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
