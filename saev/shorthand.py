"""Short flags, and the short help of `saev COMMAND --help` with the most common flags.

    saev train --shards URL --top-k 16 --objective matryoshka

stands for

    saev train objective:matryoshka --train-data.shards URL --sae.activation.top-k 16

Long names keep working, and `--help-all` explains all flags under them.
"""

import re
import typing as tp

import pydantic
import tyro

from saev.config import (
    InferenceCommand,
    InferenceConfig,
    ShardsConfig,
    TrainConfig,
    VisualsCommand,
    VisualsConfig,
)
from saev.config.base import Config
from saev.config.images import ImgFolder
from saev.config.loaders import DataConfig, LoaderConfig
from saev.config.many import ManySaes
from saev.config.named import FIRST_LOOK
from saev.config.run import RunConfig
from saev.config.sae import SaeConfig, TopK, Vanilla

LONG_HELP = "--help-all"


class Flag(tp.NamedTuple):
    """A flag in a short help."""

    short: str
    """The short name, without dashes."""
    long: str
    """The long flag. If it ends with ":", the flag's value chooses this subcommand."""
    of: type[Config] | str
    """The config with its description, or the description itself."""
    default: str = ""
    """Text for the default value; by default that of the config."""


class Command(tp.NamedTuple):
    """A command's short help."""

    config: type[Config]
    examples: tuple[str, ...]
    groups: dict[str, tuple[Flag, ...]]


IMAGES = Flag("images", "data:img-folder --data.root", ImgFolder, "required")
DEVICE = Flag("device", "device", TrainConfig)

COMMANDS: dict[str, Command] = {
    "shards": Command(
        ShardsConfig,
        (
            "saev shards --family dinov2 --ckpt vits14 --layers -1 --images ~/pictures",
            "saev shards --family clip --ckpt ViT-B-16/openai data:imagenet",
        ),
        {
            "images": (
                IMAGES._replace(default="or data:…, see --help-all"),
                Flag("image-size", "image-size", ShardsConfig, "the model's"),
                Flag("skip-unreadable", "skip-unreadable", ShardsConfig),
            ),
            "model": (
                Flag("family", "family", ShardsConfig),
                Flag("ckpt", "ckpt", ShardsConfig),
                Flag("layers", "layers", ShardsConfig),
                DEVICE,
                Flag("batch-size", "batch-size", ShardsConfig),
            ),
            "result": (
                Flag("shards-root", "shards-root", ShardsConfig),
                Flag("dtype", "dtype", ShardsConfig),
            ),
        },
    ),
    "train": Command(
        TrainConfig,
        (
            "saev train --shards out/shards/HASH --top-k 32",
            "saev train --shards out/shards/HASH --sweep topk --n-train 10_000_000",
            "saev train --shards out/shards/HASH --activation jump-relu --target-l0 32",
        ),
        {
            "data": (
                Flag("shards", "train-data.shards", LoaderConfig, "required"),
                Flag("layer", "train-data.layer", LoaderConfig, "the only one"),
                Flag("val-fraction", "train-data.val-fraction", LoaderConfig, "0.1"),
            ),
            "SAE": (
                Flag(
                    "activation",
                    "sae.activation:",
                    "top-k, batch-top-k, relu or jump-relu.",
                    "top-k",
                ),
                Flag("top-k", "sae.activation.top-k", TopK),
                Flag("target-l0", "objective.target-l0", Vanilla, "none"),
                Flag("d-sae", "sae.d-sae", SaeConfig, "16 × d_model"),
                Flag("objective", "objective:", "vanilla or matryoshka.", "vanilla"),
                Flag("sweep", "sweep", TrainConfig, "one SAE"),
            ),
            "optimiser": (
                Flag("n-train", "n-train", TrainConfig, "10 epochs"),
                Flag("batch-size", "batch-size", TrainConfig, "16,384, less in a short run"),
                Flag("lr", "lr", TrainConfig, "by d_sae"),
                Flag("seed", "seed", TrainConfig),
            ),
            "run": (
                Flag("runs-root", "runs-root", TrainConfig),
                Flag("tag", "tag", TrainConfig, "none"),
                DEVICE,
            ),
        },
    ),
    "inference": Command(
        InferenceCommand,
        (
            "saev inference --run out/runs/ID --shards out/shards/HASH",
            "saev inference --runs out/runs --tag widths",
        ),
        {
            "common": (
                Flag("run", "run", InferenceCommand, "required, or --runs"),
                Flag("runs", "runs", InferenceCommand, "none"),
                Flag("tag", "tag", InferenceCommand, "any"),
                Flag("shards", "data.shards", DataConfig, "those of training"),
                Flag("layer", "data.layer", DataConfig, "that of training"),
                Flag("out", "out", InferenceConfig, "RUN/inference/HASH"),
                Flag("n-top", "n-top", InferenceConfig),
                Flag("save", "save", InferenceConfig),
                DEVICE,
            ),
        },
    ),
    "visuals": Command(
        VisualsCommand,
        (
            "saev visuals --run out/runs/ID --shards out/shards/HASH --latents 17 42",
            "saev visuals --runs out/runs --shards out/shards/HASH",
        ),
        {
            "common": (
                Flag("run", "run", ManySaes, "required, or --runs"),
                Flag("runs", "runs", ManySaes, "none"),
                Flag("tag", "tag", ManySaes, "any"),
                Flag("shards", "shards", VisualsConfig, "required"),
                Flag("latents", "latents", VisualsConfig, "none"),
                Flag("n-latents", "n-latents", VisualsConfig),
                Flag("n-top", "n-top", VisualsConfig),
                Flag("out", "out", VisualsConfig, "INFERENCE/report"),
                Flag("log-freq-range", "log-freq-range", VisualsConfig),
                Flag("log-value-range", "log-value-range", VisualsConfig),
            ),
        },
    ),
    "run": Command(
        RunConfig,
        (
            "saev run ~/pictures",
            "saev run ~/pictures --config dinov2-small --root out",
            "saev run --config job.toml --root s3://bucket/saev",
        ),
        {
            "common": (
                Flag("config", "config", RunConfig, FIRST_LOOK),
                IMAGES._replace(default="[data] of the file; or data:…, see --help-all"),
                Flag("root", "root", RunConfig),
            ),
        },
    ),
}


def expand(argv: tp.Sequence[str]) -> list[str]:
    """Replace short flags of a command line by long ones."""
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        return list(argv)
    shorts = {flag.short: flag.long for flags in command.groups.values() for flag in flags}
    chosen: list[str] = []  # subcommands come first, because all flags may follow them
    rest: list[str] = []
    words = iter(argv[1:])
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        long = shorts.get(name.replace("_", "-")) if word.startswith("--") else None
        if long is None or long == name:
            rest.append(word)
        elif long.endswith(":"):
            value = value if equals else next(words, "")
            chosen.append(f"{long}{value}")
        else:
            *subcommands, flag = long.split()
            chosen += subcommands
            rest.append(f"--{flag.removeprefix('--')}{equals}{value}")
    chosen.sort(reverse=True)  # sae.activation: before objective:, as tyro wants them
    return [argv[0], *chosen, *rest]


def wants_help(argv: tp.Sequence[str]) -> bool:
    """Whether a command line asks for the help of a command that has a short help."""
    return bool(argv) and argv[0] in COMMANDS and ("--help" in argv[1:] or "-h" in argv[1:])


def show_help(name: str) -> tp.NoReturn:
    """Print a command's short help and exit with status 0."""
    command = COMMANDS[name]
    fields: dict[str, tp.Any] = {}
    for title, flags in command.groups.items():
        shown: dict[str, tp.Any] = {_key(flag.short): _field(flag) for flag in flags}
        group: tp.Any = pydantic.create_model(title, **shown)
        fields[_key(title)] = (tyro.conf.OmitArgPrefixes[group], group.model_construct())  # type: ignore[misc]
    examples = "\n".join(f"  {line}" for line in command.examples)
    summary = " ".join((command.config.__doc__ or "").split("\n\n")[0].split())
    tyro.cli(
        pydantic.create_model(name, **fields),
        prog=f"saev {name}",
        description=f"{summary}\n\n{examples}\n\n{LONG_HELP} explains all flags.",
        args=["--help"],
    )
    raise AssertionError("tyro exits when it has printed the help")


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name).lower()


def _field(flag: Flag) -> tuple[tp.Any, tp.Any]:
    """Type and default of a flag, for tyro."""
    kind: tp.Any = str
    if isinstance(flag.of, str):
        text, default = flag.of, ""
    else:
        found = flag.of.model_fields[_key(flag.long.rpartition(".")[2].split()[-1])]
        kind, text = found.annotation, _first_sentence(found.description or "")
        default = "" if found.is_required() else found.get_default(call_default_factory=True)
    if flag.default:
        is_whole = flag.default.startswith(("required", "or "))
        hint = f"({flag.default})" if is_whole else f"(default: {flag.default})"
        numbers = (name for t, name in _NUMBERS.items() if t in tp.get_args(kind))
        metavar = next(numbers, None)  # without "{None}|"
        kind = tp.Annotated[kind, tyro.conf.arg(help_behavior_hint=hint, metavar=metavar)]
    return (kind, pydantic.Field(default=default, description=text))


_NUMBERS = {int: "INT", float: "FLOAT"}


def _first_sentence(text: str) -> str:
    """The first sentence of a description. --help-all prints the others."""
    parts = re.split(r"(?<=[.;])\s", text)
    for n in range(1, len(parts) + 1):
        sentence = " ".join(parts[:n])
        if sentence.count("(") == sentence.count(")"):
            return sentence.rstrip(".;") + "."
    return text
