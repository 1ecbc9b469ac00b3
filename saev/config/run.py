"""The config of `saev run`: all stages from one file."""

import tomllib
import typing as tp

import pydantic

from saev import storage
from saev.config.base import Config
from saev.config.images import ImageData
from saev.errors import ConfigError, CorruptDataError


class RunConfig(Config):
    """Images in, a picture book of features out: all four stages, skipping what is done."""

    config: str
    """URL of a TOML file with the tables [shards], [train], [inference] and [visuals]; their keys
    are the flags of those commands."""
    root: str = "./saev-out"
    """URL of the folder for everything: root/shards, root/runs and root/index.html."""
    data: ImageData | None = None
    """The images; by default the [data] table of the file."""


class RunFile(Config):
    """What the file of `saev run --config` holds."""

    data: ImageData | None = None
    """The images."""
    shards: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of ShardsConfig."""
    train: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of TrainConfig. `sweep` may be given relative to the file."""
    inference: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of InferenceConfig."""
    visuals: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Keys of VisualsConfig."""

    @classmethod
    def read(cls, url: str) -> "RunFile":
        """Parse the file. Raises ConfigError that names a wrong key."""
        return cls.from_dict(read_toml(url), source=storage.normalize(url))


def read_toml(url: str) -> dict[str, tp.Any]:
    """A TOML file. Raises ConfigError that says where it does not parse."""
    try:
        return tomllib.loads(storage.read_text(url))
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{storage.normalize(url)} is not valid TOML: {err}.") from err
    except CorruptDataError as err:
        raise ConfigError(str(err)) from err
