"""Config files and sweeps that come with saev, by their names.

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
"""Name of the config of `saev run` where none is named."""
_NAME = re.compile(r"(?:configs/)?(?:sweep-)?(?P<name>[a-z0-9-]+)(?:\.toml)?")
"""A name, or the path at which version 0.1.0 kept the file in its checkout."""


def find(given: str, folder: str) -> str:
    """What a flag names: the user's own file, or else the one of saev that is called so.

    Args:
        given: what the user wrote.
        folder: where saev's own files of this kind are.

    Raises:
        ValueError: it is a name, and neither a file nor one of saev's is called so.
    """
    found = _NAME.fullmatch(given)
    if not found or storage.exists(given):
        return given
    ours = storage.join(folder, f"{found['name']}.toml")
    if storage.exists(ours):
        return ours
    if given == found["name"]:
        raise ValueError(
            f"there is no file {given!r}, and none of this name comes with saev, which has "
            f"{', '.join(names(folder))}"
        )
    return given


def named_sweep(given: str) -> str:
    """The sweep that is meant. Raises ValueError; see :func:`find`."""
    return find(given, _SWEEPS) if given else ""


def named_config(given: str) -> str:
    """The config that is meant. Raises ValueError; see :func:`find`."""
    return find(given, _CONFIGS) if given else ""


def names(folder: str) -> list[str]:
    """Names of the files of a kind that come with saev, sorted."""
    found = (storage.name(entry.url) for entry in storage.list_dir(folder))
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


ConfigFile = tp.Annotated[str, pydantic.AfterValidator(named_config)]
"""A path, a URL, or the name of a config that comes with saev."""
SweepFile = tp.Annotated[str, pydantic.AfterValidator(named_sweep)]
"""A path, a URL, or the name of a sweep that comes with saev."""
