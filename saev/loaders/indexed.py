"""Random access to single vectors, as a torch Dataset."""

import os
import typing as tp
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from saev.config.loaders import NO_LABEL, DataConfig
from saev.errors import ConfigError
from saev.loaders.batches import Batch
from saev.loaders.selection import Selection
from saev.shards import Shards


class Item(tp.NamedTuple):
    """One vector. ``torch.utils.data.default_collate`` makes columns of a list of them."""

    act: Float[Tensor, "d_model"]
    """Activations."""
    example_idx: int
    """Row of `Shards.examples()`."""
    token_idx: int
    """Content token, or -1 for the class token."""
    token_label: int
    """Label; NO_LABEL for the class token, or if labels were not requested."""
    layer: int
    """Block number."""


class IndexedActivations(Dataset[Item]):
    """Vector i of a shards folder, in the order of :class:`saev.loaders.OrderedLoader`.

    Use it to look at single vectors. Training with it is many times slower than with ShuffledLoader
    (benchmarks/loader.py). It may be pickled, or forked into the workers of a DataLoader; each
    worker opens the folder again.

    Args:
        shards: the folder.
        cfg: which activations (``cfg.shards`` is not used).
        labels: give labels.
        dtype: dtype of the vectors.
        verify: read the whole example of a vector and check its checksum; the last example is
            cached. False reads only the vector. (Protocol 2.1 has no checksums.)

    Raises:
        ConfigError: the config does not fit the data, or nothing is left of them.
    """

    def __init__(
        self,
        shards: Shards,
        cfg: DataConfig,
        *,
        labels: bool = False,
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
    ):
        self.cfg = cfg
        self._shards = shards
        self._pid = os.getpid()
        self._labels = labels
        self._dtype = dtype
        self._verify = verify
        self._selection = Selection(shards, cfg, labels=labels)
        self._last: tuple[tuple[int, int], Tensor] | None = None

    @classmethod
    def _open(
        cls, url: str, cfg: DataConfig, labels: bool, dtype: torch.dtype, verify: bool
    ) -> tp.Self:
        return cls(Shards.open(url), cfg, labels=labels, dtype=dtype, verify=verify)

    def __reduce__(self) -> tuple[tp.Any, ...]:
        args = (self._shards.url, self.cfg, self._labels, self._dtype, self._verify)
        return type(self)._open, args

    @property
    def shards(self) -> Shards:
        """The folder. A forked process opens it again, because it cannot use its parent's
        connections."""
        if self._pid != os.getpid():
            self._shards = Shards.open(self._shards.url)
            self._pid = os.getpid()
        return self._shards

    def __len__(self) -> int:
        return self._selection.n_tokens

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several vectors at once, read in the order of the files."""
        batch = self.gather(indices)
        labels = (
            [NO_LABEL] * len(indices) if batch.token_labels is None else batch.token_labels.tolist()
        )
        columns = (
            batch.example_idx.tolist(),
            batch.token_idx.tolist(),
            labels,
            batch.layer.tolist(),
        )
        return [Item(*row) for row in zip(batch.act, *columns, strict=True)]

    def gather(self, indices: Sequence[int] | np.ndarray | Tensor) -> Batch:
        """Several vectors as one batch.

        Raises:
            IndexError: an index is not in [-len, len).
            CorruptDataError: a checksum differs or a file ends early.
        """
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1:
            raise ConfigError(f"Indices have {index.ndim} dimensions, expected 1.")
        index = np.where(index < 0, index + len(self), index)
        wrong = (index < 0) | (index >= len(self))
        if wrong.any():
            raise IndexError(
                f"Index {np.asarray(indices)[wrong][0]} is out of range for {len(self)} vectors."
            )
        layer, example, kept = self._locate(index)
        act = self._read(layer, example, kept)
        selection = self._selection
        token = kept - int(selection.has_cls)
        labels = None
        if self._labels and selection.labels is not None:
            labels = np.where(
                token < 0, np.int16(NO_LABEL), selection.labels[example, np.maximum(token, 0)]
            )
        numbers = np.asarray(selection.layers, dtype=np.int64)
        return Batch(
            act,
            torch.from_numpy(example),
            torch.from_numpy(token),
            None if labels is None else torch.from_numpy(labels),
            torch.from_numpy(numbers[layer]),
        )

    def _locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position of the layer, example, and token as recorded (class token first)."""
        selection = self._selection
        layer, row = np.divmod(index, selection.cum_rows[-1])
        position = np.searchsorted(selection.cum_rows, row, side="right") - 1
        example = selection.examples[position]
        nth = row - selection.cum_rows[position]
        if selection.ignored is None:
            first = int(selection.tokens == "content" and selection.has_cls)
            return layer, example, nth + first
        wanted = selection.mask(example).cumsum(axis=1)
        return layer, example, np.argmax(wanted == nth[:, None] + 1, axis=1)

    def _read(self, layer: np.ndarray, example: np.ndarray, token: np.ndarray) -> Tensor:
        shards = self.shards
        out = torch.empty(len(example), shards.d_model, dtype=shards.dtype)
        for i in np.lexsort((token, example, layer)).tolist():
            number, t = self._selection.layers[layer[i]], int(token[i])
            if self._verify and shards.metadata.protocol == "3.0":
                out[i] = self._example(shards, number, int(example[i]))[t]
            else:
                shard, local = shards.locate(int(example[i]))
                shards.read_vector(shard, number, local, t, out[i])
        return out.to(self._dtype)

    def _example(self, shards: Shards, layer: int, example: int) -> Tensor:
        key, last = (layer, example), self._last
        if last is None or last[0] != key:
            shard, local = shards.locate(example)
            vectors = shards.read(shard, layer, local, local + 1, verify=True)[0]
            last = self._last = (key, vectors)
        return last[1]
