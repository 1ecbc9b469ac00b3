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
    """This process's place by the environment that torchrun sets; None if it was started by itself,
    or is the only one.

    Raises:
        ConfigError: the variables are not numbers.
    """
    if not all(os.environ.get(name) for name in _NAMES):
        return None
    found = Place(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0"))
    return found if found.size > 1 else None


def refuse_to_be_alone() -> None:
    """Raise ConfigError in the pod of one of several machines, if nobody gave this process a rank.

    Kubeflow Trainer tells torchrun of its machines, by PET_NNODES and the like, and torchrun tells
    the ranks. A process that is started without torchrun on each machine would train by itself.
    """
    nodes = os.environ.get("PET_NNODES", "")
    if not os.environ.get("RANK") and nodes not in ("", "1", "1:1"):
        raise ConfigError(
            f"The environment has PET_NNODES={nodes}, so this machine is one of several that train "
            "together, but no RANK: each of them would train alone. Start the command with "
            "torchrun, as `torchrun --nproc-per-node N -m saev …`, or unset PET_NNODES."
        )


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(
            f"The environment has {name}={text!r}, expected a number. Start the ranks with "
            "torchrun, or unset RANK and WORLD_SIZE to train in one process."
        )
    return int(text)
