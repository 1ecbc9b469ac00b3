"""What torchrun, or whoever else starts the processes of one training, tells each of them."""

import os
import typing as tp

from saev.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(tp.NamedTuple):
    """One process among several that train together."""

    rank: int
    """Its number, from 0."""
    size: int
    """How many there are, on all machines."""
    local_rank: int
    """Its number on this machine, and that of its GPU."""


def place() -> Place | None:
    """This process's place by the environment that torchrun and Kubeflow Trainer set; None if it
    was started by itself, or is the only one.

    Raises:
        ConfigError: the variables are not numbers.
    """
    if not all(os.environ.get(name) for name in _NAMES):
        return None
    found = Place(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0"))
    return found if found.size > 1 else None


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(
            f"The environment has {name}={text!r}, expected a number. Start the ranks with "
            "torchrun, or unset RANK and WORLD_SIZE to train in one process."
        )
    return int(text)
