"""Recorded activations: format, reader and writer. The stage is `saev.shards.extract`."""

import typing as tp

from saev.shards.protocol import Layout, Metadata, ShardInfo

if tp.TYPE_CHECKING:
    from saev.shards.reader import LayerStats, Shards

__all__ = ["LayerStats", "Layout", "Metadata", "ShardInfo", "Shards"]


def __getattr__(name: str) -> tp.Any:
    # Imported on first use, so that the format's arithmetic does not import torch.
    if name in ("LayerStats", "Shards"):
        from saev.shards import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
