"""The loader for training: it shuffles well with large reads."""

import logging

import torch

from saev.config.loaders import LoaderConfig
from saev.loaders.base import Loader, kept_bytes, reader_threads
from saev.loaders.order import choose_sizes
from saev.loaders.selection import Selection
from saev.shards import Shards

logger = logging.getLogger(__name__)

_FEW_EXAMPLES = 64
_STAGE_SHARE = 4


class ShuffledLoader(Loader):
    """Gives every wanted token exactly once per epoch, in an order that mixes the whole dataset.

    The order (:mod:`saev.loaders.order`) depends only on data, config and seed, not on the number
    of threads or the device. Memory: ``cfg.buffer_mb`` for windows (on the GPU if ``device`` is
    one), plus labels.bin if labels are needed, plus a few batches. Batches may be kept: their
    memory is reused only when nothing refers to it.

    Args:
        shards: the folder. It is not closed with the loader.
        cfg: which activations, and how to read them (``cfg.shards`` is not used).
        batch_size: rows of a batch over all ranks. The last batch of an epoch may be smaller.
        seed: seed of the order.
        epochs: epochs of one pass, or None for an endless pass. Every epoch has another order.
        drop_last: leave out the last batch of an epoch if it is smaller.
        labels: give ``token_labels``.
        rank: the share of every batch to give. The rows of all ranks' t-th batches together are the
            t-th batch of a single loader. Each rank reads only its own rows, about 1/world_size of
            a batch; for tiny batches there may be none.
        world_size: number of ranks, among which ``cfg.buffer_mb`` is divided.
        device: device of the batches, ``cpu`` or ``cuda:N``.
        dtype: dtype of the batches' activations.

    Raises:
        ConfigError: the config does not fit the data, or selects no tokens.
    """

    def __init__(
        self,
        shards: Shards,
        cfg: LoaderConfig,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        drop_last: bool = False,
        labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        selection = Selection(shards, cfg, labels=labels)
        buffer_bytes = int(cfg.buffer_mb * 2**20)
        n_threads = reader_threads(shards, cfg.n_threads)
        read_bytes = max(1, shards.layouts[0].row_bytes)
        n_examples = len(selection.examples) * len(selection.layers)
        stage_bytes = 0
        if selection.tokens == "special":  # needs a buffer of one block per thread
            stage_bytes = buffer_bytes // _STAGE_SHARE
        sizes = choose_sizes(
            n_examples=n_examples,
            read_bytes=read_bytes,
            kept_bytes=kept_bytes(shards, selection),
            buffer_bytes=buffer_bytes - stage_bytes,
            shard_examples=selection.max_shard_examples,
        )
        if stage_bytes:
            most = max(1, stage_bytes // (sizes.block_examples * read_bytes))
            n_threads = min(n_threads, most)
        if n_examples > _FEW_EXAMPLES >= sizes.window_examples:
            logger.warning(
                "buffer_mb=%g holds windows of only %d examples, so the rows of a batch will be of "
                "few images. Raise buffer_mb for a better shuffle.",
                cfg.buffer_mb,
                sizes.window_examples,
            )
        super().__init__(
            shards,
            cfg,
            selection,
            sizes,
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            epochs=epochs,
            drop_last=drop_last,
            labels=labels,
            rank=rank,
            world_size=world_size,
            device=device,
            dtype=dtype,
            n_threads=n_threads,
            verify=cfg.verify,
        )
