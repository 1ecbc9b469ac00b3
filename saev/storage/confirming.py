"""Bytes that differ from what was recorded are read again before anything is said about them.

A bit can flip in memory, in a cache, in a controller or on a wire, and then a sound object looks
damaged once. So all code that compares bytes with a checksum does it through :func:`confirmed`.
Bytes that do not fit are read again past every cache. Only bytes that are wrong in the same way
each time count as damage.
"""

import logging
import typing as tp
from collections.abc import Callable

from saev.errors import SaevError, StorageError

log = logging.getLogger(__name__)

_REREADS = 2

Bytes = bytes | bytearray | memoryview
BytesT = tp.TypeVar("BytesT", bound=Bytes)


def confirmed(
    url: str,
    read: Callable[[bool], BytesT],
    wrong: Callable[[BytesT], SaevError | None],
    difference: Callable[[Bytes, Bytes], str] | None = None,
) -> BytesT:
    """Read bytes, if necessary several times, until they are right.

    Args:
        url: the object, for messages.
        read: reads them, past every cache if it gets True. It may use the same memory each time.
        wrong: says what is wrong with some bytes; None if they are right.
        difference: says where two reads differ.

    Raises:
        SaevError: what ``wrong`` says, if every read gave the same bytes.
        StorageError: the reads differ from each other, so nothing is known of what is stored.
    """
    data = read(False)
    error = wrong(data)
    if error is None:
        return data
    first, differs = bytes(data), ""
    for _ in range(_REREADS):
        data = read(True)
        again = wrong(data)
        if data != first:
            differs = (difference or _first_difference)(first, data)
        if again is None:
            log.warning(
                "%s was read wrongly once: %s. A second read, past all caches, is right, so what "
                "is stored is sound. If this happens again, check the memory, the local disk and "
                "the network of this machine.",
                *(url, differs),
            )
            return data
    if differs:
        raise StorageError(
            f"{url} cannot be read reliably: {1 + _REREADS} reads do not fit its checksum and "
            f"differ from each other ({differs}). What is stored may be sound, so do not delete "
            "it: check the memory, the local disk and the network of this machine, and run the "
            "same command on another one."
        ) from error
    raise error


def _first_difference(first: Bytes, second: Bytes) -> str:
    """Where two buffers differ, in words."""
    if len(first) != len(second):
        return f"{len(first)} bytes, then {len(second)}"
    low, high = 0, len(first)
    a, b = memoryview(first), memoryview(second)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] != b[low:middle]:
            high = middle
        else:
            low = middle
    return f"byte {low} was 0x{first[low]:02x}, then 0x{second[low]:02x}"
