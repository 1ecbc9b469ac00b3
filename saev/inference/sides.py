"""The side of an example: whether the SAE was trained on it, or it was held out."""

import typing as tp

import numpy as np
import pyarrow as pa

from saev import storage
from saev.config.loaders import DataConfig
from saev.config.train import TrainConfig
from saev.shards import Shards
from saev.shards.protocol import in_validation

UNKNOWN, TRAINING, HELD_OUT = 0, 1, 2
NAMES = ("unknown", "training", "held-out")
"""How tables name the sides."""


def of_examples(
    shards: Shards, examples: np.ndarray, trained: TrainConfig | None, trained_hash: str | None
) -> np.ndarray:
    """The side of each example.

    Sides are known for the shards folder that a run was trained on, and for the folder that the run
    named for its evaluation.

    Args:
        shards: the folder.
        examples: of the folder, int64 [n].
        trained: the config of the SAE's training; None if it is not known.
        trained_hash: hash of the shards that it was trained on.

    Returns:
        UNKNOWN, TRAINING or HELD_OUT, int8 [n].
    """
    sides = np.full(len(examples), UNKNOWN, dtype=np.int8)
    if trained is None:
        return sides
    data = trained.train_data
    if trained_hash == shards.metadata.hash or _is_at(data.shards, shards):
        sides[:] = HELD_OUT
        sides[_selected(examples, data)] = TRAINING
    elif _is_at(trained.val_data.shards, shards):
        sides[_selected(examples, trained.val_loader())] = HELD_OUT
    return sides


def names(side: np.ndarray) -> pa.Array:
    """The names of sides, for a column of a table."""
    return pa.array(NAMES).take(pa.array(side))


def _is_at(url: str, shards: Shards) -> bool:
    return bool(url) and storage.normalize(url) == shards.url


def _selected(examples: np.ndarray, data: DataConfig) -> tp.Any:
    if data.split == "all":
        return np.ones(len(examples), dtype=bool)
    in_val = in_validation(examples, data.val_fraction)
    return in_val if data.split == "val" else ~in_val
