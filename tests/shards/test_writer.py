"""One shard file: its bytes, checksums and moments, whatever the batches."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saev import storage
from saev.errors import ConfigError, ModelError, StorageError
from saev.shards.protocol import Layout, Metadata
from saev.shards.reader import TORCH_DTYPES
from saev.shards.writer import ShardWriter, Written, file_checksum


def metadata(n_layers: int = 2, *, dtype: str = "float32", cls_token: bool = True) -> Metadata:
    return Metadata(
        family="clip", ckpt="ViT", layers=tuple(range(5, 5 + n_layers)), cls_token=cls_token,
        content_tokens_per_example=3, d_model=4, n_examples=99, max_tokens_per_shard=10_000,
        data={}, dtype=dtype,
    )  # fmt: skip


def activations(meta: Metadata, n: int, seed: int = 0) -> Tensor:
    shape = (len(meta.layers), n, meta.tokens_per_example, meta.d_model)
    acts = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (acts * torch.logspace(-2, 2, meta.d_model)).to(TORCH_DTYPES[meta.dtype])


def write(url: str, meta: Metadata, acts: Tensor, cuts: list[int], capacity: int) -> Written:
    with ShardWriter(url, meta, capacity) as writer:
        for start, stop in itertools.pairwise([0, *cuts, acts.shape[1]]):
            writer.write(acts[:, start:stop])
    return writer.written


def raw(acts: Tensor) -> bytes:
    return acts.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    missing=st.integers(0, 3),
    n_layers=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    cls_token=st.booleans(),
    remote=st.booleans(),
)
def test_any_batches_give_the_same_file(
    tmp_path_factory: pytest.TempPathFactory,
    n: int, cuts: list[int], missing: int, n_layers: int, dtype: str, cls_token: bool, remote: bool,
) -> None:  # fmt: skip
    meta = metadata(n_layers, dtype=dtype, cls_token=cls_token)
    acts = activations(meta, n)
    folder = "memory://writer" if remote else str(tmp_path_factory.getbasetemp())
    url = storage.join(folder, "acts000000.bin")
    written = write(url, meta, acts, sorted(min(c, n) for c in cuts), n + missing)
    assert storage.read_bytes(url) == raw(acts)
    assert written.n_examples == n
    assert written.checksums.shape == (n_layers, n)
    for layer, example in itertools.product(range(n_layers), range(n)):
        assert written.checksums[layer, example] == storage.crc32c(raw(acts[layer, example]))
    assert file_checksum(Layout.of(meta, n), written.checksums) == storage.checksum(url)
    # Bit for bit what one batch gives, and what it should be.
    whole = write(url, meta, acts, [], n)
    n_special = int(cls_token)
    stored = acts.double().numpy()
    for kind, values in (
        ("special", stored[:, :, :n_special]),
        ("content", stored[:, :, n_special:]),
    ):
        moments, reference = getattr(written, kind), getattr(whole, kind)
        assert moments.count == reference.count == values.shape[1] * values.shape[2]
        assert moments.total.tobytes() == reference.total.tobytes()
        assert moments.sq_total.tobytes() == reference.sq_total.tobytes()
        np.testing.assert_allclose(moments.total, values.sum((1, 2)), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(moments.sq_total, (values**2).sum((1, 2)), rtol=1e-12)


@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(tmp_path: Path, value: float, token: int) -> None:
    meta = metadata()
    acts = activations(meta, 6)
    acts[1, 4, token, 3] = value
    message = r"Layer 6 of clip ViT is NaN or infinite for example 4 of x\.bin, as float32"
    with pytest.raises(ModelError, match=message):
        write(str(tmp_path / "x.bin"), meta, acts, [2, 3], 6)
    assert os.listdir(tmp_path) == []


def test_overflow_of_float16_names_the_remedy(tmp_path: Path) -> None:
    meta = metadata(dtype="float16")
    acts = activations(metadata(), 3)
    acts[0, 2, 1, 1] = 70_000
    with pytest.raises(ModelError, match=r"Layer 5 .* example 2 .* --dtype bfloat16 or float32"):
        write(str(tmp_path / "x.bin"), meta, acts.half(), [], 3)


def test_large_float32_values_do_not_overflow_the_sums(tmp_path: Path) -> None:
    meta = metadata(1)
    acts = torch.full((1, 3, 4, 4), 3e38)
    written = write(str(tmp_path / "x.bin"), meta, acts, [], 3)
    assert np.isfinite(written.content.sq_total).all()


def test_wrong_batches_are_refused(tmp_path: Path) -> None:
    meta = metadata()
    good = activations(meta, 2)
    for bad in (good[:1], good[..., :2], good[:, :, 1:], good.double(), good[0]):
        with (
            pytest.raises(ConfigError, match=r"expected \(2, .*, 4, 4\) torch\.float32"),
            ShardWriter(str(tmp_path / "x.bin"), meta, 2) as writer,
        ):
            writer.write(bad)
    with pytest.raises(ConfigError, match="room for 1 examples, 2 were written"):
        write(str(tmp_path / "x.bin"), meta, good, [], 1)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    real = os.pwrite

    def pwrite(*args: object) -> int:
        if next(calls) == 5:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    meta = metadata()
    with pytest.raises(StorageError, match="no space left on the device"):
        write(str(tmp_path / "x.bin"), meta, activations(meta, 8), [2, 4, 6], 8)
    assert os.listdir(tmp_path) == []
