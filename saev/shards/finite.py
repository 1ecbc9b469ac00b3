"""Errors about NaN and infinity in shards, with shard, example and layer.

`saev shards` refuses to record such values. They come from other software that recorded a model's
overflow, or from a damaged folder without checksums.
"""

import torch
from torch import Tensor

from saev.errors import CorruptDataError
from saev.shards.reader import Shards


def bad_row(acts: Tensor) -> int | None:
    """The first row of [n, d_model] with NaN or infinity; None if there is none. It waits for a
    GPU."""
    if bool(acts.isfinite().all()):
        return None
    return int(acts.isfinite().all(1).logical_not().int().argmax())


def check(acts: Tensor, examples: Tensor, shards: Shards, layer: int) -> None:
    """Raise CorruptDataError if activations hold NaN or infinity.

    Args:
        acts: [n, d_model].
        examples: the example of each row, int64 [n].
        shards: the shards of the activations.
        layer: block number.

    Raises:
        CorruptDataError: there is NaN or infinity; names shard, example and layer.
    """
    row = bad_row(acts)
    if row is not None:
        raise error(shards, int(examples[row]), layer)


def error(shards: Shards, example: int, layer: int) -> CorruptDataError:
    """The error for an example that holds NaN or infinity."""
    shard, position = shards.locate(example)
    x = shards.read(shard, layer, position, position + 1).float()
    kind = "NaN" if bool(x.isnan().any()) else "infinity"
    return CorruptDataError(
        f"{shards.url}/{shards.infos[shard].name} holds {kind} in the activations of example "
        f"{example}, layer {layer}; expected finite numbers. Nothing can be computed from them. "
        "Record the images again (float16 overflows at 65,504; bfloat16 and float32 do not), or "
        "leave that example out."
    )


def find(shards: Shards, layer: int) -> CorruptDataError | None:
    """The error for the first NaN or infinity of a layer; None if there is none. Reads the layer up
    to this value."""
    for i, info in enumerate(shards.infos):
        for start in range(0, info.n_examples, 64):
            x = shards.read(i, layer, start, min(start + 64, info.n_examples))
            bad = torch.nonzero(x.isfinite().flatten(1).all(1).logical_not())
            if len(bad):
                return error(shards, int(shards.shard_starts[i]) + start + int(bad[0]), layer)
    return None
