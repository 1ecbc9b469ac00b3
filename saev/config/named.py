"""Config files and sweeps that come with saev, found by name.

saev run --config dinov2-small          saev/configs/dinov2-small.toml
saev train --sweep topk                 saev/configs/sweeps/topk.toml
"""

import importlib.resources
import re
import typing as tp

import pydantic

from saev import storage

_CONFIGS = storage.join(str(importlib.resources.files("saev")), "configs")
_SWEEPS = storage.join(_CONFIGS, "sweeps")
FIRST_LOOK = "first-look"
"""Name of the default config of `saev run`."""
_NAME = re.compile(r"(?:configs/)?(?:sweep-)?(?P<name>[a-z0-9-]+)(?:\.toml)?")
"""A name, or the path of the file in a checkout of version 0.1.0."""


def find(given: str, folder: str) -> str:
    """The file that a flag names: a file of the user, or else a file of saev with this name.

    Args:
        given: value of the flag.
        folder: the folder of saev's own files of this kind.

    Raises:
        ValueError: it is a name, but no file has this name.
    """
    found = _NAME.fullmatch(given)
    if not found or storage.exists(given):
        return given
    ours = storage.join(folder, f"{found['name']}.toml")
    if storage.exists(ours):
        return ours
    if given == found["name"]:
        raise ValueError(
            f"there is no file {given!r}, and saev has none with this name; it has "
            f"{', '.join(names(folder))}"
        )
    return given


def named_sweep(given: str) -> str:
    """The file of a sweep. Raises ValueError; see :func:`find`."""
    return find(given, _SWEEPS) if given else ""


def named_config(given: str) -> str:
    """The file of a config. Raises ValueError; see :func:`find`."""
    return find(given, _CONFIGS) if given else ""


def names(folder: str) -> list[str]:
    """Names of saev's own files in a folder, sorted."""
    found = (storage.name(entry.url) for entry in storage.list_dir(folder))
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


ConfigFile = tp.Annotated[str, pydantic.AfterValidator(named_config)]
"""A path, a URL, or the name of a config that comes with saev."""
SweepFile = tp.Annotated[str, pydantic.AfterValidator(named_sweep)]
"""A path, a URL, or the name of a sweep that comes with saev."""
