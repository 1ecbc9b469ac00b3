"""CRC-32C of a whole from its pieces, compared with the direct one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev import storage
from saev.storage import combining


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine_is_the_crc_of_both(first: bytes, second: bytes) -> None:
    combined = combining.combine(storage.crc32c(first), storage.crc32c(second), len(second))
    assert combined == storage.crc32c(first + second)


@given(st.integers(0, 40), st.lists(st.randoms(use_true_random=False), max_size=8))
def test_concatenate_is_the_crc_of_all(length: int, sources: list) -> None:
    pieces = [source.randbytes(length) for source in sources]
    crcs = [storage.crc32c(piece) for piece in pieces]
    assert combining.concatenate(crcs, length) == storage.crc32c(b"".join(pieces))


def test_long_pieces() -> None:
    first, second = b"\x55" * (3 << 20), bytes(range(256)) * 10_007
    combined = combining.combine(storage.crc32c(first), storage.crc32c(second), len(second))
    assert combined == storage.crc32c(first + second)
    # Lengths beyond any buffer: pushing through zeros in two steps is pushing through their sum.
    a, b = 5 << 40, 7 << 41
    assert combining.combine(combining.combine(1, 0, a), 0, b) == combining.combine(1, 0, a + b)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        combining.combine(1, 2, -1)
