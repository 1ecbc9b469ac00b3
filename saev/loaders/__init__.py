"""Activations in batches: shuffled, in dataset order, or by index."""

from saev.config.loaders import NO_LABEL
from saev.loaders.batches import Batch
from saev.loaders.indexed import IndexedActivations, Item
from saev.loaders.metrics import batch_metrics
from saev.loaders.ordered import OrderedLoader
from saev.loaders.selection import selected_layers
from saev.loaders.shuffled import ShuffledLoader

__all__ = [
    "NO_LABEL",
    "Batch",
    "IndexedActivations",
    "Item",
    "OrderedLoader",
    "ShuffledLoader",
    "batch_metrics",
    "selected_layers",
]
