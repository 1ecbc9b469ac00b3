"""The environment variables by which torchrun tells each process its rank."""

import os
import typing as tp

from saev.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(tp.NamedTuple):
    """A process among several that train together."""

    rank: int
    """Number of the process, from 0."""
    size: int
    """Number of processes on all machines."""
    local_rank: int
    """Number of the process on this machine, which is also the number of its GPU."""


def place() -> Place | None:
    """The place of this process, from the environment that torchrun sets. None if the process was
    not started by torchrun, or is the only one.

    Raises:
        ConfigError: the variables are not numbers.
    """
    if not all(os.environ.get(name) for name in _NAMES):
        return None
    found = Place(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0"))
    return found if found.size > 1 else None


def refuse_to_be_alone() -> None:
    """Raise ConfigError if this is one of several machines, but the process has no rank.

    Kubeflow Trainer sets PET_NNODES and other variables for torchrun, and torchrun sets the rank of
    each process. Processes that are started without torchrun would each train alone.
    """
    nodes = os.environ.get("PET_NNODES", "")
    if not os.environ.get("RANK") and nodes not in ("", "1", "1:1"):
        raise ConfigError(
            f"The environment has PET_NNODES={nodes}, so this machine is one of several that train "
            "together, but no RANK: each of them would train alone. Start the command with "
            "torchrun, as in `torchrun --nproc-per-node N -m saev …`, or unset PET_NNODES."
        )


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(
            f"The environment has {name}={text!r}, expected a number. Start the ranks with "
            "torchrun, or unset RANK and WORLD_SIZE to train in one process."
        )
    return int(text)
