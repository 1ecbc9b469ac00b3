"""Records of finished shards, and what is made of them."""

import dataclasses
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saev.errors import CorruptDataError
from saev.shards.columns import EXAMPLES_SCHEMA
from saev.shards.parts import ExampleRow, Part, Skipped, _parquet, _table
from saev.shards.writer import Moments, Written

rng = np.random.default_rng(0)
rows = st.builds(
    ExampleRow, st.integers(0, 2**40), st.text(max_size=9), st.text(max_size=5),
    st.integers(-1, 2**40), st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1),
    st.none() | st.integers(0, 2**32 - 1),
)  # fmt: skip


def part(examples: list[ExampleRow], n_layers: int, *, labels: bool) -> Part:
    def moments() -> Moments:
        total, sq_total = rng.standard_normal((2, n_layers, 3))
        return Moments(total, sq_total, 2**53 + 1)

    n = len(examples)
    checksums = rng.integers(0, 2**32, (n_layers, n), np.uint32)
    return Part(
        Written(n, checksums, moments(), moments()),
        examples,
        [Skipped(7, "s3://x/ü.png", "it is empty")],
        rng.integers(0, 256, (n, 4), np.uint8) if labels else None,
    )


def same(a: Part, b: Part) -> None:
    assert (a.examples, a.skipped) == (b.examples, b.skipped)
    assert a.written.n_examples == b.written.n_examples
    np.testing.assert_array_equal(a.written.checksums, b.written.checksums)
    for one, other in (
        (a.written.content, b.written.content),
        (a.written.special, b.written.special),
    ):
        for x, y in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True):
            np.testing.assert_array_equal(x, y)
    assert (a.labels is None) == (b.labels is None)
    if a.labels is not None:
        np.testing.assert_array_equal(a.labels, b.labels)


@settings(deadline=None)
@given(st.lists(rows, max_size=5), st.integers(1, 3), st.booleans())
def test_round_trip(examples: list[ExampleRow], n_layers: int, labels: bool) -> None:
    original = part(examples, n_layers, labels=labels)
    data = original.to_bytes()
    assert data == original.to_bytes()
    same(Part.from_bytes(data, "here"), original)


@settings(deadline=None)
@given(st.data())
def test_any_damage_is_found(data: st.DataObject) -> None:
    whole = part([ExampleRow(0, "a", "", -1, 2, 3)], 2, labels=True).to_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        damaged = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
    with pytest.raises(CorruptDataError, match=r"x\.part is damaged"):
        Part.from_bytes(damaged, "x.part")


@settings(deadline=None)
@given(st.lists(rows, max_size=5))
def test_parquet_holds_the_rows_and_nothing_else(examples: list[ExampleRow]) -> None:
    data = _parquet([_table(examples)])
    assert data == _parquet([_table(examples[:2]), _table([]), _table(examples[2:])])
    table = pq.read_table(io.BytesIO(data))
    assert table.column_names == EXAMPLES_SCHEMA.names
    assert table.schema.types == EXAMPLES_SCHEMA.types
    assert [tuple(row.values()) for row in table.to_pylist()] == examples
    assert not pq.read_metadata(io.BytesIO(data)).metadata
