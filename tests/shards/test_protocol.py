"""Metadata and the arithmetic of the layout, for both protocols."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev import storage
from saev.errors import ConfigError, CorruptDataError
from saev.shards.protocol import ITEMSIZE, Layout, Metadata, in_validation

small = st.integers(1, 5)


@st.composite
def metadatas(draw: st.DrawFn) -> Metadata:
    return Metadata(
        protocol=draw(st.sampled_from(["3.0", "2.1"])),
        family=draw(st.text(max_size=5)),
        ckpt="x",
        layers=tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True))),
        content_tokens_per_example=draw(st.integers(0, 5)),
        cls_token=draw(st.booleans()),
        d_model=draw(small),
        n_examples=draw(st.integers(0, 50)),
        max_tokens_per_shard=draw(st.integers(1, 200)),
        data=draw(st.dictionaries(st.text(max_size=3), st.integers())),
        dtype=draw(st.sampled_from(sorted(ITEMSIZE))),
    )


@given(metadatas(), st.integers(0, 5))
def test_offsets_are_those_of_the_array(meta: Metadata, n: int) -> None:
    layout = Layout.of(meta, n)
    n_layers, tokens = len(meta.layers), meta.tokens_per_example
    order = (n_layers, n, tokens) if meta.protocol == "3.0" else (n, n_layers, tokens)
    rows = np.arange(n * n_layers * tokens).reshape(order)
    if meta.protocol == "2.1":
        rows = rows.swapaxes(0, 1)
    vector = meta.d_model * ITEMSIZE[meta.dtype]
    assert layout.n_bytes == rows.size * vector
    assert layout.row_bytes == tokens * vector
    for layer, example, token in itertools.product(range(n_layers), range(n), range(tokens)):
        assert layout.offset(layer, example, token) == rows[layer, example, token] * vector
    assert layout.contiguous == (meta.protocol == "3.0" or n_layers == 1 or tokens == 0)


@given(metadatas())
def test_shards_part_the_examples(meta: Metadata) -> None:
    ranges = [meta.shard_range(i) for i in range(meta.n_shards)]
    assert [i for a, b in ranges for i in range(a, b)] == list(range(meta.n_examples))
    for start, stop in ranges:
        assert 0 < stop - start <= meta.examples_per_shard
        vectors = (stop - start) * meta.tokens_per_example * len(meta.layers)
        assert vectors <= meta.max_tokens_per_shard or stop - start == 1


@given(metadatas())
def test_metadata_survives_json(meta: Metadata) -> None:
    again = Metadata.from_dict(json.loads(json.dumps(meta.to_dict())))
    assert again == meta
    assert again.hash == meta.hash


@given(metadatas(), metadatas())
def test_unequal_metadata_have_unequal_names(a: Metadata, b: Metadata) -> None:
    assert (a.hash == b.hash) == (a.to_dict() == b.to_dict())


def test_published_sizes() -> None:
    """The guide's CLIP ViT-B/16, six layers: 2,400,000 // (197 * 6) examples in a shard."""
    meta = Metadata(
        family="clip", ckpt="ViT-B-16/openai", layers=(6, 7, 8, 9, 10, 11), cls_token=True,
        content_tokens_per_example=196, d_model=768, n_examples=20_210,
        max_tokens_per_shard=2_400_000, data={},
    )  # fmt: skip
    assert (meta.tokens_per_example, meta.examples_per_shard, meta.n_shards) == (197, 2030, 10)
    assert Layout.of(meta, 2030).n_bytes == 2030 * 6 * 197 * 768 * 4


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_the_validation_share_is_as_asked(fraction: float) -> None:
    chosen = in_validation(np.arange(100_000), fraction)
    assert abs(chosen.mean() - fraction) < 0.005
    # Decided for each index by itself, and a larger share holds a smaller one.
    assert (in_validation(np.arange(500, 700), fraction) == chosen[500:700]).all()
    assert not (chosen & ~in_validation(np.arange(100_000), min(0.995, fraction + 0.1))).any()


def _write(folder: Path, meta: Metadata, **changes: object) -> str:
    url = str(folder / meta.hash)
    storage.write_json(storage.join(url, "metadata.json"), {**meta.to_dict(), **changes})
    return url


def test_metadata_that_does_not_fit_its_folder(tmp_path: Path) -> None:
    meta = Metadata(
        family="f", ckpt="c", layers=(1,), content_tokens_per_example=4, cls_token=False,
        d_model=2, n_examples=3, max_tokens_per_shard=9, data={},
    )  # fmt: skip
    assert Metadata.read(_write(tmp_path, meta)) == meta
    with pytest.raises(CorruptDataError, match=f"its hash is .* the folder is named {meta.hash}"):
        Metadata.read(_write(tmp_path, meta, d_model=3))
    with pytest.raises(CorruptDataError, match=r"protocol is '4\.0', expected '3\.0' or '2\.1'"):
        Metadata.read(_write(tmp_path, meta, protocol="4.0"))
    with pytest.raises(ConfigError, match="nonsense: unknown key"):
        Metadata.read(_write(tmp_path, meta, nonsense=1))
    with pytest.raises(ConfigError, match="d_model"):
        Metadata.read(_write(tmp_path, meta, d_model="wide"))
