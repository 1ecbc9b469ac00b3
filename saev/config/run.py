"""The config of `saev run`: all stages from one file."""

import typing as tp

import pydantic
import tyro

from saev import storage
from saev.config.base import Config
from saev.config.images import ImageData
from saev.config.named import FIRST_LOOK, ConfigFile, named_sweep
from saev.errors import ConfigError, CorruptDataError


class RunConfig(Config):
    """Images in, a picture book of features out: all four stages, skipping what is done."""

    pictures: tyro.conf.Positional[str] = ""
    """URL of a folder of images, or of one with masks: `images` and `annotations` below it."""
    config: ConfigFile = pydantic.Field(default=FIRST_LOOK, validate_default=True)
    """Name of a config that comes with saev (such as dinov2-small), or URL of a TOML file (or a
    .json file) with the tables [shards], [train], [inference] and [visuals]; their keys are the
    flags of those commands. first-look is one SAE of DINOv2 ViT-S/14, in minutes."""
    root: str = "./saev-out"
    """URL of the folder for everything: root/shards, root/runs and root/index.html."""
    ckpt: str = ""
    """Checkpoint of the model, in place of the file's (see `saev shards`): NAME@FILE takes the
    weights from a file, where there is no model hub."""
    skip_unreadable: bool = False
    """Leave out images that cannot be decoded, as first-look does by itself."""
    amp: bool = False
    """Record in bfloat16 autocast: faster on many GPUs and CPUs, and more rounded."""
    data: ImageData | None = None
    """The images; by default the [data] table of the file."""

    @property
    def over_shards(self) -> dict[str, tp.Any]:
        """Keys of [shards] that replace those of the file."""
        given = {"ckpt": self.ckpt, "skip_unreadable": self.skip_unreadable, "amp": self.amp}
        return {key: value for key, value in given.items() if value}


class RunFile(Config):
    """Content of the file of `saev run --config`."""

    data: ImageData | None = None
    """The images."""
    shards: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of ShardsConfig."""
    train: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of TrainConfig. `sweep` may be given relative to the file."""
    sweep: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Content of a sweep file, instead of train.sweep."""
    inference: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of InferenceConfig."""
    visuals: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of VisualsConfig."""

    @classmethod
    def read(cls, url: str) -> tp.Self:
        """Parse the file. Raises ConfigError that names a wrong key."""
        source = storage.normalize(url)
        if not source.endswith(".json"):
            return cls.from_dict(read_toml(url), source=source)
        try:
            return cls.from_dict(storage.read_json(url), source=source)
        except CorruptDataError as err:
            raise ConfigError(str(err)) from err

    @classmethod
    def portable(cls, url: str) -> tp.Self:
        """Read the file and put its sweep into the table [sweep], so that it does not need another
        file.

        Raises:
            ConfigError: a key of the file is wrong, or it has two sweeps.
            StorageError: the file or the sweep cannot be read.
        """
        file = cls.read(url)
        sweep = file.train.get("sweep")
        if not sweep:
            return file
        if file.sweep:
            raise ConfigError(
                f"{storage.normalize(url)} has a table [sweep] and names {sweep} in [train]; "
                "keep one of them."
            )
        train = {key: value for key, value in file.train.items() if key != "sweep"}
        table = read_toml(beside(url, sweep))
        return file.model_copy(update={"train": train, "sweep": table})


def beside(config: str, sweep: str) -> str:
    """URL of the sweep of a config file. A relative path is first looked up beside the file.

    Raises ConfigError if there is no such file, and saev has no sweep with this name.
    """
    near = storage.join(storage.parent(config), sweep)
    is_relative = "://" not in sweep and not sweep.startswith("/")
    if is_relative and storage.exists(near):
        return near
    try:
        return named_sweep(sweep)
    except ValueError as err:
        raise ConfigError(f"{storage.normalize(config)}, train.sweep: {err}.") from err


def read_toml(url: str) -> dict[str, tp.Any]:
    """Read a TOML file. Raises ConfigError that names the line of a mistake."""
    try:
        return storage.parse_toml(storage.read_bytes(url), storage.normalize(url), ConfigError)
    except CorruptDataError as err:
        raise ConfigError(str(err)) from err
