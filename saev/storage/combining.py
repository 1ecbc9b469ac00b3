"""The checksum of an object, computed from the checksums of its pieces without reading them again.

A shard is written at many offsets at once, so no running checksum sees its bytes in order. CRCs are
linear: ``crc(a + b) = zeros(crc(a), len(b)) XOR crc(b)``. Here ``zeros(crc, n)`` is the CRC after
``n`` more zero bytes, which is a product with a 32 x 32 matrix over GF(2). The method is
``crc32_combine`` of zlib (Mark Adler), here for CRC-32C.
"""

import functools
from collections.abc import Iterable

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
_Matrix = tuple[int, ...]  # column i is where bit i goes


def combine(first: int, second: int, second_length: int) -> int:
    """CRC-32C of two buffers, one after the other.

    Args:
        first: CRC of the first buffer.
        second: CRC of the second buffer.
        second_length: bytes of the second buffer.
    """
    return _times(_zeros(second_length), first) ^ second


def concatenate(pieces: Iterable[int], length: int) -> int:
    """CRC-32C of buffers of equal length, one after the other.

    Args:
        pieces: the CRC of each.
        length: bytes of each.
    """
    matrix, crc = _zeros(length), 0
    for piece in pieces:
        crc = _times(matrix, crc) ^ piece
    return crc


def _times(matrix: _Matrix, vector: int) -> int:
    product = 0
    while vector:
        low = vector & -vector
        product ^= matrix[low.bit_length() - 1]
        vector ^= low
    return product


def _square(matrix: _Matrix) -> _Matrix:
    return tuple(_times(matrix, column) for column in matrix)


@functools.lru_cache(maxsize=64)
def _zeros(length: int) -> _Matrix:
    """The matrix that appends ``length`` zero bytes to a CRC."""
    if length < 0:
        raise ValueError(f"length is {length}, expected at least 0")
    power: _Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one zero bit
    for _ in range(3):
        power = _square(power)  # one zero byte
    result: _Matrix = tuple(1 << bit for bit in range(32))
    while length:
        if length & 1:
            result = tuple(_times(power, column) for column in result)
        power = _square(power)
        length >>= 1
    return result
