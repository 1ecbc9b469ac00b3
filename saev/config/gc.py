"""The config of `saev gc`."""

import re
import typing as tp

import pydantic
import tyro

from saev.config.base import Config

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def seconds(age: str) -> float:
    """Parse an age such as ``30m``, ``12h``, ``7d`` or ``2w``; 0 for an empty text.

    Raises:
        ValueError: the text is not an age.
    """
    if not age:
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", age.strip())
    if match is None:
        raise ValueError(
            f"{age!r} is not an age; expected a number and m, h, d or w, such as 12h or 7d"
        )
    return float(match[1]) * _UNITS[match[2]]


class GcConfig(Config):
    """List what may be deleted below a root, and delete it with --delete.

    Without further flags, it lists the remains of unfinished work. Complete runs and shards are
    listed only with --older-than, --tag or --shards. Shards that a complete run refers to are never
    listed.
    """

    root: str
    """URL of the folder that holds `shards` and `runs`."""
    older_than: str = ""
    """Only what has not changed for this time (30m, 12h, 7d, 2w), complete or not."""
    tag: str = ""
    """Only runs with this tag, complete or not."""
    shards: tuple[str, ...] = ()
    """Only these shards folders (names below root/shards), complete or not."""
    incomplete: bool = False
    """Nothing that is complete, even if other flags select it."""
    grace: str = "24h"
    """Nothing that has changed within this time, because a process may be working on it."""
    delete: bool = False
    """Delete what is listed. On a terminal it asks first."""
    yes: bool = False
    """Do not ask."""
    as_json: tp.Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of a table."""

    @pydantic.field_validator("older_than", "grace")
    @classmethod
    def _is_age(cls, age: str) -> str:
        seconds(age)
        return age
