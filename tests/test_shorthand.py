"""Short flags, and the short help that has them."""

import re

import pytest

from saev import cli, shorthand
from saev.config import BatchTopK, ImgFolder, JumpRelu, Matryoshka, TopK, TrainConfig, Vanilla


def parsed(line: str) -> TrainConfig:
    cfg = cli.parse(line.split())
    assert isinstance(cfg, TrainConfig)
    return cfg


def test_short_flags_mean_the_long_ones() -> None:
    short = "train --shards URL --layer -1 --top-k 16 --d-sae 64 --val-fraction=0.2"
    long = (
        "train --train-data.shards URL --train-data.layer -1 --sae.activation.top-k 16 "
        "--sae.d-sae 64 --train-data.val-fraction 0.2"
    )
    assert parsed(short) == parsed(long)
    assert parsed(short).sae.activation == TopK(top_k=16)


@pytest.mark.parametrize(
    ("line", "activation", "objective"),
    [
        ("--activation batch-top-k --top-k 8", BatchTopK(top_k=8), Vanilla()),
        ("--top-k 8 --activation=batch-top-k", BatchTopK(top_k=8), Vanilla()),
        ("--target-l0 9 --activation jump-relu", JumpRelu(), Vanilla(target_l0=9.0)),
        ("--objective matryoshka --top-k 8", TopK(top_k=8), Matryoshka()),
        (
            "--target_l0 9 --objective matryoshka --activation jump-relu",
            JumpRelu(), Matryoshka(target_l0=9.0),
        ),
    ],
)  # fmt: skip
def test_kinds_are_flags_in_any_order(line: str, activation: object, objective: object) -> None:
    cfg = parsed(f"train --shards URL {line}")
    assert (cfg.sae.activation, cfg.objective) == (activation, objective)


def test_images_are_a_folder() -> None:
    for line in ("shards --images /x", "run --config dinov2-small --images /x"):
        assert cli.parse(line.split()).data == ImgFolder(root="/x")


def test_what_was_set_is_known_by_its_long_name() -> None:
    """A sweep must not override it."""
    argv = shorthand.expand("train --top-k 16 --objective vanilla".split())
    assert {"sae.activation.top_k", "objective.kind"} <= cli.explicit_keys(argv)
    assert shorthand.expand(argv) == argv


@pytest.mark.parametrize(
    "line", ["", "gc --root x", "step train --job x", "train objective:vanilla --lr 1e-3"]
)
def test_other_lines_are_left_alone(line: str) -> None:
    assert shorthand.expand(line.split()) == line.split()


@pytest.mark.parametrize("command", shorthand.COMMANDS)
def test_the_short_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.parse([command, "--help"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0
    assert err == ""
    usage, empty, example, *rest = out.splitlines()
    assert len(rest) <= 57
    assert max(map(len, rest)) <= 80
    assert (usage.split()[:3], empty) == (["usage:", "saev", command], "")
    assert example.strip() == shorthand.COMMANDS[command].examples[0]
    for flags in shorthand.COMMANDS[command].groups.values():
        for flag in flags:
            name = flag.word if flag.short == flag.long and flag.word else f"--{flag.short}"
            assert re.search(rf"{name}\b", out), flag.short


def test_the_help_of_saev_fits_a_screen(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for argv in (["--help"], ["-h"], ["--help-all"]):
        with pytest.raises(SystemExit) as ended:
            cli.parse(argv)
        lines = capsys.readouterr().out.splitlines()
        assert ended.value.code == 0
        assert len(lines) <= 50
        assert max(map(len, lines)) <= 80
        assert lines[2].strip() == "saev run ~/pictures"
        listed = {line.strip("│ ").split(" ")[0] for line in lines}
        assert set(cli.COMMANDS) <= listed


@pytest.mark.parametrize("command", shorthand.COMMANDS)
def test_its_examples_parse(command: str) -> None:
    for line in shorthand.COMMANDS[command].examples:
        words = line.replace("job.toml", "clip-vitb16").split()
        assert words[:2] == ["saev", command]
        cli.parse(words[1:])


def test_a_wrong_kind_lists_the_right_ones(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse("train --activation topk".split())
    assert ended.value.code == 2
    assert "sae.activation:top-k" in capsys.readouterr().err
