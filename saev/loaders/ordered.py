"""The loader in dataset order."""

import torch

from saev.config.loaders import DataConfig
from saev.errors import ConfigError
from saev.loaders.base import Loader, kept_bytes, reader_threads
from saev.loaders.order import MAX_BLOCK_BYTES, Sizes
from saev.loaders.selection import Selection
from saev.loaders.windows import N_BUFFERS
from saev.shards import Shards

_MIN_BLOCKS = 16
"""Blocks of a window, if it is large enough. So many threads can read it at the same time."""


class OrderedLoader(Loader):
    """Gives every wanted token exactly once, in dataset order: by layer, example, token.

    The class token comes before the content tokens of its example.

    Args:
        shards: the folder. It is not closed with the loader.
        cfg: which activations (``cfg.shards`` and settings of the shuffle are not used).
        batch_size: rows of a batch. The last batch may be smaller.
        shard_range: only shards in [start, stop). If they have no wanted tokens, there is no batch.
        example_range: only examples in [start, stop), instead of ``shard_range``.
        selection: the selection of ``cfg``, or a part of it (:meth:`Selection.only`), instead of a
            range. So several loaders can share one selection, which may have read all labels.
        epochs: number of epochs, or None for an endless pass.
        drop_last: leave out the last batch if it is smaller.
        labels: give ``token_labels``.
        device: device of the batches, ``cpu`` or ``cuda:N``.
        dtype: dtype of the batches' activations.
        buffer_mb: memory for reading ahead, in MiB; more if two examples need more.
        n_threads: reader threads; 0 chooses a number that suits the storage, as LoaderConfig does.
        verify: check every example against its recorded checksum.

    Raises:
        ConfigError: the config does not fit the data, or selects no tokens.
    """

    def __init__(
        self,
        shards: Shards,
        cfg: DataConfig,
        batch_size: int,
        *,
        shard_range: tuple[int, int] | None = None,
        example_range: tuple[int, int] | None = None,
        selection: Selection | None = None,
        epochs: int | None = 1,
        drop_last: bool = False,
        labels: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        buffer_mb: float = 128,
        n_threads: int = 0,
        verify: bool = True,
    ):
        if shard_range is not None:
            example_range = _examples_of_shards(shards, shard_range, example_range)
        if selection is None:
            selection = Selection(shards, cfg, labels=labels, example_range=example_range)
        if epochs is None and not selection.n_tokens:
            raise ConfigError(
                f"Examples {example_range} of {shards.url} hold no wanted tokens, so an endless "
                "pass over them has no batch. Give a number of epochs or another range."
            )
        n_threads = reader_threads(shards, n_threads)
        per_example = kept_bytes(shards, selection)
        read_bytes = max(1, max((x.row_bytes for x in shards.layouts), default=1))
        window = max(1, int(buffer_mb * 2**20) // (N_BUFFERS * per_example))
        block = max(1, min(MAX_BLOCK_BYTES // read_bytes, window // _MIN_BLOCKS))
        block = min(block, max(1, selection.max_shard_examples))
        super().__init__(
            shards,
            cfg,
            selection,
            Sizes(block, max(1, window // block)),
            batch_size=batch_size,
            shuffle=False,
            seed=0,
            epochs=epochs,
            drop_last=drop_last,
            labels=labels,
            rank=0,
            world_size=1,
            device=device,
            dtype=dtype,
            n_threads=n_threads,
            verify=verify,
        )


def _examples_of_shards(
    shards: Shards, span: tuple[int, int], example_range: tuple[int, int] | None
) -> tuple[int, int]:
    if example_range is not None:
        raise ConfigError("Give shard_range or example_range, not both.")
    start, stop = span
    if not 0 <= start <= stop <= len(shards.infos):
        raise ConfigError(
            f"Shards {start}:{stop} are not in {shards.url}: it has {len(shards.infos)}."
        )
    return int(shards.shard_starts[start]), int(shards.shard_starts[stop])
