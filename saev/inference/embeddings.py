"""Embeddings of images, by which `monosemanticity` compares them.

An image's embedding is its class token of the last recorded layer. If no class token was recorded,
it is the mean of the image's content tokens of that layer. At most MAX_IMAGES images have one, at
even steps.
"""

import concurrent.futures
import math
import typing as tp
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saev.config.loaders import DataConfig
from saev.inference.codes import TokenRows
from saev.inference.source import TokenSource
from saev.limits import EMBEDDED_IMAGES
from saev.shards import Shards

MAX_IMAGES = EMBEDDED_IMAGES
_STEP_IMAGES = 16
_READERS = 16
_TABLE_NUMBERS = 1 << 16
"""Numbers that are written at a time."""


def sample(examples: np.ndarray) -> np.ndarray:
    """The examples that get an embedding, of those that are selected, int64, ascending."""
    return examples[:: max(1, math.ceil(len(examples) / MAX_IMAGES))]


def config(shards: Shards) -> DataConfig:
    """The tokens from which embeddings are computed."""
    tokens: tp.Literal["special", "content"] = "special" if shards.metadata.cls_token else "content"
    return DataConfig(shards=shards.url, layer=shards.layers[-1], tokens=tokens)


def rows(
    example_idx: np.ndarray, vectors: np.ndarray, value: pa.DataType
) -> Iterator[dict[str, tp.Any]]:
    """Rows of `embeddings.parquet`, some at a time.

    Args:
        example_idx: the images, int64 [n].
        vectors: of each, float32 [n, d_model].
        value: type of the numbers in the table.
    """
    width = vectors.shape[1]
    step = max(1, _TABLE_NUMBERS // width)
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step].astype(value.to_pandas_dtype())
        ptr = np.arange(len(some) + 1, dtype=np.int32) * width
        column = pa.ListArray.from_arrays(ptr, pa.array(some.reshape(-1)))
        yield {"example": example_idx[start : start + step], "embedding": column}


class Embedder:
    """Collects the embeddings of some examples.

    Args:
        shards: the folder.
        data: the tokens that are read for the SAE.
        examples: those that get an embedding, int64, ascending.
    """

    def __init__(self, shards: Shards, data: DataConfig, examples: np.ndarray):
        self.examples = examples
        self._shards = shards
        wanted = config(shards)
        self._is_same_layer = data.layer == wanted.layer
        self.is_read_anyway = (
            self._is_same_layer and data.tokens == wanted.tokens and not data.ignore_labels
        )
        """Whether the tokens that are read for the SAE are those of embeddings: then :meth:`add`
        takes them, and :meth:`read` is not needed."""
        self._shape = (len(examples), shards.d_model)
        self._found: list[np.ndarray] = []

    def add(self, x: Tensor, tokens: TokenRows) -> None:
        """Take the next tokens, of whole examples."""
        is_first = np.diff(tokens.example_idx, prepend=-1) != 0
        starts, examples = np.flatnonzero(is_first), tokens.example_idx[is_first]
        wanted = np.isin(examples, self.examples)
        if not wanted.any():
            return
        lengths = np.diff(starts, append=len(tokens.example_idx))
        for start, length in zip(starts[wanted], lengths[wanted], strict=True):
            vectors = x[start : start + length].cpu().numpy()
            self._found.append(vectors.mean(axis=0, dtype=np.float64).astype(np.float32))

    def read(self, source: TokenSource) -> None:
        """Read the tokens of the embeddings, which are not read for the SAE.

        Raises:
            CorruptDataError: a shard is damaged.
        """
        if not (self._shards.metadata.cls_token and self._is_same_layer):
            for _, chunk in source.chunks(self.examples, [_STEP_IMAGES]):
                self.add(*chunk)
            return
        # Single vectors have no checksums of their own. But those of the whole examples were
        # compared when the SAE's tokens were read.
        with concurrent.futures.ThreadPoolExecutor(_READERS, "saev-embeddings") as pool:
            self._found += pool.map(self._class_token, self.examples.tolist())

    def _class_token(self, example: int) -> np.ndarray:
        shards = self._shards
        shard, position = shards.locate(example)
        vector = torch.empty(shards.d_model, dtype=shards.dtype)
        shards.read_vector(shard, shards.layers[-1], position, 0, vector)
        return vector.float().numpy()

    def result(self) -> np.ndarray:
        """float32 [n, d_model], in the order of the examples."""
        return np.stack(self._found) if self._found else np.zeros(self._shape, dtype=np.float32)
