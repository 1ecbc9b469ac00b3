"""Short flags, and what `saev COMMAND --help` shows of each command (saev/usage.py).

    saev train --shards URL --top-k 16 --objective matryoshka

stands for

    saev train objective:matryoshka --train-data.shards URL --sae.activation.top-k 16

Long names keep working, and `--help-all` explains all flags under them.
"""

import typing as tp

from saev.config import (
    InferenceCommand,
    InferenceConfig,
    ShardsConfig,
    TrainConfig,
    VisualsCommand,
    VisualsConfig,
)
from saev.config.base import Config
from saev.config.gc import GcConfig
from saev.config.images import ImgFolder
from saev.config.loaders import DataConfig, LoaderConfig
from saev.config.look import LookConfig
from saev.config.many import ManySaes
from saev.config.named import FIRST_LOOK
from saev.config.pages import NotebookConfig, OpenConfig, ReportConfig, ServeConfig
from saev.config.run import RunConfig
from saev.config.sae import SaeConfig, TopK, Vanilla
from saev.config.size import SizeConfig


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
    word: str = ""
    """What stands for the value; such an argument has no name if both names are the same."""


class Command(tp.NamedTuple):
    """A command's short help."""

    config: type[Config]
    examples: tuple[str, ...]
    groups: dict[str, tuple[Flag, ...]] = {}  # noqa: RUF012 - nothing changes it
    """The most common flags; if there are none, the short help shows all flags."""
    words: str = ""
    """What comes before the flags."""


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
                Flag("pictures", "pictures", RunConfig, "the file's [data]", "FOLDER"),
                Flag("config", "config", RunConfig, FIRST_LOOK),
                Flag("root", "root", RunConfig),
                Flag("ckpt", "ckpt", RunConfig, "the config's"),
                Flag("skip-unreadable", "skip-unreadable", RunConfig),
                Flag("amp", "amp", RunConfig),
                Flag(
                    "images",
                    "data:img-folder --data.root",
                    "Instead of FOLDER: also a glob pattern of folders or images (quote it).",
                    "FOLDER",
                ),
            ),
        },
        "[FOLDER]",
    ),
    "look": Command(
        LookConfig,
        ("saev look cat.jpg --run out/runs/ID", "saev look a.jpg b.jpg --run out/runs/ID"),
        {
            "common": (
                Flag("images", "images", LookConfig, "required", "IMAGE"),
                Flag("run", "run", LookConfig, "required"),
                Flag("shards", "shards", LookConfig, "those of training"),
                Flag("n", "n", LookConfig),
                Flag("device", "device", LookConfig),
            ),
        },
        "IMAGE…",
    ),
    "open": Command(OpenConfig, ("saev open", "saev open s3://bucket/saev"), words="[URL]"),
    "serve": Command(ServeConfig, ("saev serve", "saev serve --root s3://bucket/saev --port 8080")),
    "report": Command(
        ReportConfig,
        (
            "saev report --root saev-out",
            "saev report --run out/runs/ID --out explorer.html",
            "saev report --run out/runs/ID out/runs/ID --out explorer.html --max-mb 5",
        ),
        {
            "page": (Flag("root", "root", ReportConfig),),
            "file": (
                Flag("run", "run", ReportConfig, "none"),
                Flag("out", "out", ReportConfig, "required with --run"),
                Flag("shards", "shards", ReportConfig, "those of training"),
                Flag("max-mb", "max-mb", ReportConfig),
            ),
        },
    ),
    "notebook": Command(
        NotebookConfig, ("saev notebook start", "saev notebook metrics --out notebooks")
    ),
    "size": Command(
        SizeConfig,
        (
            "saev size --config dinov2-small --n-images 100_000",
            "saev size --model clip-vitb16 --n-images 1_281_167 --layers 6",
        ),
        {
            "job": (
                Flag("config", "config", SizeConfig, "none"),
                Flag("n-images", "n-images", SizeConfig, "those of the config"),
                Flag("model", "model", SizeConfig, "none"),
                Flag("image-size", "image-size", SizeConfig, "the model's"),
                Flag("layers", "layers", SizeConfig, "the config's"),
                Flag("dtype", "dtype", SizeConfig, "the config's"),
            ),
            "training": (
                Flag("n-train", "n-train", SizeConfig, "the config's"),
                Flag("n-saes", "n-saes", SizeConfig),
                Flag("d-sae", "d-sae", SizeConfig, "the config's"),
                Flag("top-k", "top-k", SizeConfig, "the config's"),
            ),
            "speed": (
                Flag("images-per-second", "images-per-second", SizeConfig, "none"),
                Flag("tokens-per-second", "tokens-per-second", SizeConfig, "none"),
                Flag("gb-per-second", "gb-per-second", SizeConfig, "none"),
            ),
        },
    ),
    "gc": Command(
        GcConfig,
        (
            "saev gc --root out",
            "saev gc --root out --tag old --delete",
            "saev gc --root s3://bucket/saev --older-than 30d --incomplete",
        ),
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
