"""How the processes of one training find each other, and which device each of them takes."""

import atexit
import datetime
import typing as tp

import torch
import torch.distributed as dist

from saev.config import TrainConfig
from saev.device import choose_device
from saev.errors import ConfigError, RankError
from saev.nn.ranks import ALONE, Ranks
from saev.torchrun import Place

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a rank waits for the others. Rank 0 may be writing a large resume point."""
N_RANKS_REMEDY = "Give --n-ranks 1, or leave the number out of --device."


class Team(tp.NamedTuple):
    """A process's part in a training."""

    ranks: Ranks
    device: torch.device


def alone(config: TrainConfig) -> Team:
    """For training in one process."""
    return Team(ALONE, choose_device(config.device))


def n_ranks(config: TrainConfig) -> int:
    """How many processes to start on this machine: `n_ranks`, or by default one per GPU.

    Raises:
        ConfigError: there are fewer GPUs than that, or `device` names one of them.
    """
    on_gpus, one = _on_gpus(config), ":" in config.device
    n_gpus = torch.cuda.device_count() if on_gpus else 0
    wanted = config.n_ranks or (1 if one else max(1, n_gpus))
    if wanted > 1 and one:
        raise ConfigError(
            f"--n-ranks is {wanted}, but --device {config.device} is one device. {N_RANKS_REMEDY}"
        )
    if wanted > 1 and on_gpus and wanted > n_gpus:
        raise ConfigError(
            f"--n-ranks is {wanted}, but there are {n_gpus} GPUs here. Lower it, or give "
            "--device cpu."
        )
    return wanted


def join(place: Place, config: TrainConfig, store: dist.Store | None = None) -> Team:
    """Connect to the other ranks. Later calls, for other groups of SAEs, use the same connections.

    Args:
        place: rank of this process and number of ranks.
        config: of the SAEs.
        store: through which the ranks find each other; by default the environment names it.

    Raises:
        ConfigError: there is no GPU for this rank, or `n_ranks` is another number.
        RankError: the other ranks did not connect in time.
    """
    if config.n_ranks not in (0, place.size):
        raise ConfigError(
            f"--n-ranks is {config.n_ranks}, but {place.size} ranks were started. Leave it out."
        )
    if ":" in config.device:
        raise ConfigError(
            f"--device {config.device} is one device for {place.size} ranks. {N_RANKS_REMEDY}"
        )
    device = torch.device("cpu")
    if _on_gpus(config):
        n_gpus = torch.cuda.device_count()
        if place.local_rank >= n_gpus:
            raise ConfigError(
                f"Rank {place.rank} is the {place.local_rank + 1}th on its machine, which has "
                f"{n_gpus} GPUs. Start as many ranks as there are GPUs, or give --device cpu."
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(
                backend, store=store, timeout=TIMEOUT, rank=place.rank, world_size=place.size
            )
        except RuntimeError as err:
            reason = str(err).splitlines()[0]
            raise RankError(
                f"Rank {place.rank} of {place.size} cannot connect to the others ({reason}). Read "
                "their messages, and check MASTER_ADDR and MASTER_PORT."
            ) from err
        atexit.register(leave)
    return Team(Ranks(place.rank, place.size), device)


def leave() -> None:
    """Disconnect from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _on_gpus(config: TrainConfig) -> bool:
    return config.device.startswith("cuda") or (
        config.device == "auto" and torch.cuda.is_available()
    )
