"""Batches, which are cut from a window by one vectorised gather.

On the CPU, numpy gathers on the consumer's thread. More threads are hardly faster, because memory
bandwidth is the limit and the readers use it too. torch's threads wait for each other in a busy
loop: if a reader or another process used one of the cores, a gather took five times as long.
"""

import itertools
import sys
import typing as tp

import numpy as np
import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from saev.config.loaders import NO_LABEL
from saev.loaders.windows import Window

_CONVERT_VALUES = 1 << 15
"""Values of float16 per conversion. For this number torch does not use several threads."""
_WIDEN_VALUES = 1 << 17
"""Values of bfloat16 per conversion. This number fits into a core's cache."""


class Batch(tp.NamedTuple):
    """Vectors and their origin. Entry i of every field is about row i."""

    act: Float[Tensor, "batch d_model"]
    """Activations, float32 unless the loader was given another dtype."""
    example_idx: Int64[Tensor, "batch"]
    """Row of `Shards.examples()`."""
    token_idx: Int64[Tensor, "batch"]
    """Content token, 0 to content_tokens - 1, or -1 for the class token."""
    token_labels: Int16[Tensor, "batch"] | None
    """Labels (NO_LABEL for the class token), if the loader was asked for them."""
    layer: Int64[Tensor, "batch"]
    """Block number."""


class BatchMemory:
    """Memory for batches on the CPU, which is reused when the previous batch is no longer in use.

    A new tensor of 50 MB costs several times as much as the gather that fills it, because the
    kernel has to map and clear its pages. A tensor made by ``torch.from_numpy`` holds a reference
    to its array as long as any tensor, view or graph shares its storage. So an array without other
    references is free, and a batch that the user keeps is never overwritten.
    """

    KEPT = 4

    def __init__(self) -> None:
        self._arrays: list[tp.Any] = []
        probe = [torch.empty(1, dtype=torch.uint8).numpy()]
        self._idle = sys.getrefcount(probe[0])
        """CPython's reference count of an array that only a list refers to."""

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor [rows, columns]."""
        n_bytes = rows * columns * dtype.itemsize
        arrays = self._arrays
        for i in range(len(arrays)):
            if sys.getrefcount(arrays[i]) == self._idle and arrays[i].nbytes >= n_bytes:
                break
        else:
            i = len(arrays)
            arrays.append(torch.empty(n_bytes, dtype=torch.uint8).numpy())
        array = arrays[i]
        if len(arrays) > self.KEPT:
            arrays.pop(0)
        return torch.from_numpy(array)[:n_bytes].view(dtype).view(rows, columns)


class Cutter:
    """Cuts batches from windows.

    Args:
        content_tokens: content tokens per example.
        kept_tokens: tokens of an example that a window holds.
        layer: block number, if all rows have the same.
        d_model: width of a vector.
        dtype: dtype of the batches.
        device: device of the windows and the batches.
        in_order: rows are given in the order of the window, so that runs can be copied at once.
    """

    def __init__(
        self,
        *,
        content_tokens: int,
        kept_tokens: int,
        layer: int,
        d_model: int,
        dtype: torch.dtype,
        device: torch.device,
        in_order: bool,
    ):
        self._content = content_tokens
        self._kept = kept_tokens
        self._d_model = d_model
        self._dtype = dtype
        self._device = device
        self._in_order = in_order
        self._layer = torch.tensor(layer, device=device)
        self._memory = BatchMemory() if device.type == "cpu" else None
        self._piece: Tensor | None = None

    def new(self, rows: int) -> Tensor:
        """Uninitialised activations of a batch."""
        if self._memory is not None:
            return self._memory.take(rows, self._d_model, self._dtype)
        return torch.empty(rows, self._d_model, dtype=self._dtype, device=self._device)

    def gather(self, window: Window, start: int, stop: int, out: Tensor) -> Batch:
        """Rows [start, stop) of a window's order, activations into ``out``."""
        index = window.order[start:stop]
        self._gather_vectors(window.data, index, out)
        token, labels = window.token_idx[start:stop], None
        layer = self._layer.expand(len(index))
        if window.slot_layers is not None or window.slot_labels is not None:
            # index_select, because [] uses several threads even for a few thousand rows.
            slot = torch.div(index, self._kept, rounding_mode="floor")
            if window.slot_layers is not None:
                layer = window.slot_layers.index_select(0, slot)
            if window.slot_labels is not None:
                place = slot * self._content + token.clamp(min=0)
                labels = window.slot_labels.flatten().index_select(0, place).to(torch.int16)
                labels.masked_fill_(token < 0, NO_LABEL)
        return Batch(out, window.example_idx[start:stop], token, labels, layer)

    def _gather_vectors(self, data: Tensor, index: Tensor, out: Tensor) -> None:
        if self._memory is None:
            if data.dtype == out.dtype:
                torch.index_select(data, 0, index, out=out)
            else:
                out.copy_(data.index_select(0, index))
            return
        source, rows, same = _raw(data), index.numpy(), data.dtype == out.dtype
        to_float = data.dtype == torch.bfloat16 and out.dtype == torch.float32
        if self._in_order and (same or to_float):
            cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
            for a, b in itertools.pairwise(cuts if len(rows) else ()):
                run = source[rows[a] : rows[a] + b - a]
                if same:
                    _raw(out)[a:b] = run
                else:
                    _widen(run, out[a:b])
            return
        if same:
            np.take(source, rows, axis=0, out=_raw(out), mode="clip")
            return
        n = max(1, (_WIDEN_VALUES if to_float else _CONVERT_VALUES) // self._d_model)
        if self._piece is None:
            self._piece = torch.empty(n, self._d_model, dtype=data.dtype)
        for i in range(0, len(rows), n):
            piece = self._piece[: min(n, len(rows) - i)]
            np.take(source, rows[i : i + n], axis=0, out=_raw(piece), mode="clip")
            if to_float:
                _widen(_raw(piece), out[i : i + n])
            else:
                out[i : i + n].copy_(piece)


def _raw(vectors: Tensor) -> np.ndarray:
    """The same memory as a numpy array; bfloat16, which numpy lacks, as int16."""
    return (vectors.view(torch.int16) if vectors.dtype == torch.bfloat16 else vectors).numpy()


def _widen(halves: np.ndarray, out: Tensor) -> None:
    """Convert bfloat16 (as integers) to float32: its bits are the upper half of a float32."""
    bits = out.view(torch.int32).numpy().view(np.uint32)
    np.left_shift(halves.view(np.uint16), 16, out=bits, dtype=np.uint32)


def join(act: Tensor, parts: list[Batch]) -> Batch:
    """Join parts to one batch. Their activations are consecutive rows of ``act``."""
    if len(parts) == 1:
        return parts[0]
    labels = [p.token_labels for p in parts if p.token_labels is not None]
    return Batch(
        act,
        torch.cat([p.example_idx for p in parts]),
        torch.cat([p.token_idx for p in parts]),
        torch.cat(labels) if labels else None,
        torch.cat([p.layer for p in parts]),
    )
