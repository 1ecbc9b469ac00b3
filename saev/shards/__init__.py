"""Recorded activations: format, reader, writer. The stage itself is `saev.shards.extract`."""

from saev.shards.protocol import Layout, Metadata, ShardInfo
from saev.shards.reader import LayerStats, Shards

__all__ = ["LayerStats", "Layout", "Metadata", "ShardInfo", "Shards"]
