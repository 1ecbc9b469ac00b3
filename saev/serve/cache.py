"""What was read or computed, kept while there is room for it."""

import collections
import threading
import typing as tp

import numpy as np
import pyarrow as pa

T = tp.TypeVar("T")

_OVERHEAD = 200
"""Bytes of an entry beside its value."""


class ByteCache:
    """The values that were used last, in at most so many bytes. Safe to use from many threads.

    A value that others are waiting for is made once.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_bytes = 0
        """Of what is kept."""
        self._usual, self._dear = _Kept(), _Kept()
        self._locks: dict[tp.Hashable, _Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: tp.Hashable, make: tp.Callable[[], T], *, dear: bool = False) -> T:
        """The value of a key, which ``make`` gives if it is not kept.

        Args:
            key: of the value.
            make: gives it.
            dear: it takes seconds to make. It goes only if no others are left to go.
        """
        found = self.peek(key)
        if found is not None:
            return tp.cast(T, found)
        with self._lock:
            mine = self._locks.setdefault(key, _Lock())
            mine.n_waiting += 1
        try:
            with mine.lock:
                found = self.peek(key)
                if found is None:
                    found = make()
                    self._keep(key, found, self._dear if dear else self._usual)
            return tp.cast(T, found)
        finally:
            with self._lock:
                mine.n_waiting -= 1
                if not mine.n_waiting:
                    self._locks.pop(key, None)

    def peek(self, key: tp.Hashable) -> tp.Any | None:
        """The value of a key; None if it is not kept."""
        with self._lock:
            for kept in (self._usual, self._dear):
                if key in kept:
                    kept.move_to_end(key)
                    return kept[key][0]
            return None

    def _keep(self, key: tp.Hashable, value: tp.Any, kept: "_Kept") -> None:
        n = size_of(value) + _OVERHEAD
        if n > self.max_bytes:
            return
        with self._lock:
            kept[key] = (value, n)
            self.n_bytes += n
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= (self._usual or self._dear).popitem(last=False)[1][1]


class _Kept(collections.OrderedDict[tp.Hashable, tuple[tp.Any, int]]):
    """Values and their bytes, in the order of their last use."""


class _Lock:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_waiting = 0


def size_of(value: tp.Any) -> int:
    """Bytes that a value takes: of arrays and texts exactly, of an object what its ``nbytes``
    says."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, np.ndarray | pa.Table | pa.Array | pa.ChunkedArray):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(size_of(k) + size_of(v) for k, v in value.items())
    if isinstance(value, tuple | list):
        return sum(map(size_of, value))
    return int(getattr(value, "nbytes", 64))
