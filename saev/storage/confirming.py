"""Bytes with a wrong checksum are read again before they count as damaged.

A bit can flip in memory, in a cache, in a disk controller or in the network. An undamaged object
then looks damaged once. So all code that compares bytes with a checksum uses :func:`confirmed`. It
reads bytes with a wrong checksum again, past all caches. The object counts as damaged only if every
read returns the same wrong bytes.
"""

import logging
import typing as tp
from collections.abc import Callable

from saev.errors import SaevError, StorageError

logger = logging.getLogger(__name__)

_REREADS = 2

Bytes = bytes | bytearray | memoryview
BytesT = tp.TypeVar("BytesT", bound=Bytes)


def confirmed(
    url: str,
    read: Callable[[bool], BytesT],
    wrong: Callable[[BytesT], SaevError | None],
    difference: Callable[[Bytes, Bytes], str] | None = None,
) -> BytesT:
    """Read bytes and check them; read them again if the check fails.

    Args:
        url: the object, for messages.
        read: reads the bytes; ``read(True)`` bypasses all caches. It may reuse its memory.
        wrong: checks the bytes and returns the error, or None if they are right.
        difference: describes where two reads differ.

    Raises:
        SaevError: the error of ``wrong``, if every read returned the same bytes.
        StorageError: the reads differ from each other, so the state of the object is not known.
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
            logger.warning(
                "%s was read wrongly once: %s. A second read, past all caches, is right, so the "
                "stored object is sound. If this happens again, check the memory, the local disk "
                "and the network of this machine.",
                *(url, differs),
            )
            return data
    if differs:
        raise StorageError(
            f"{url} cannot be read reliably: {1 + _REREADS} reads do not fit its checksum and "
            f"differ from each other ({differs}). The stored object may be sound, so do not delete "
            "it. Check the memory, the local disk and the network of this machine, and run the "
            "same command on another one."
        ) from error
    raise error


def _first_difference(first: Bytes, second: Bytes) -> str:
    """Describe the first difference of two buffers."""
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
