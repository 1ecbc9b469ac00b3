"""Memory does not grow with the dataset."""

import os
import tracemalloc
from pathlib import Path

import pytest
from inference.world import make_world

from saev import inference, storage
from saev.config import InferenceConfig
from saev.inference import codes, concepts, topk
from saev.inference import job as job_module
from saev.inference import part as part_module


def peak_bytes(root: Path, n_examples: int) -> tuple[int, int]:
    """Most memory of Python and numpy during the stage, and the size of the codes."""
    world = make_world(
        root, n_examples=n_examples, per_shard=64, content_tokens=64, d_sae=14, top_k=6, n_labels=2
    )
    cfg = InferenceConfig(run=world.run, n_top=4)
    tracemalloc.start()
    try:
        url = inference.run(cfg)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak, os.path.getsize(Path(url) / "token_acts.npz")


@pytest.fixture
def small_buffers(monkeypatch) -> None:
    """Bounds in proportion to the small data, so that every one of them is reached."""
    monkeypatch.setattr(part_module, "_PIECE_ENTRIES", 8_000)
    monkeypatch.setattr(topk, "_COMPACT_AT", 4_000)
    monkeypatch.setattr(job_module, "_MAX_LATENT_VALUES", 50_000)
    align = concepts.align
    monkeypatch.setattr(concepts, "align", lambda c, counts: align(c, counts, 3_000))
    monkeypatch.setattr(codes, "_READERS", 2)
    monkeypatch.setattr(storage, "_CHUNK", 50_000)


def test_memory_does_not_grow(tmp_path, small_buffers) -> None:
    peak_bytes(tmp_path / "warm", 64)  # imports and caches
    small, small_size = peak_bytes(tmp_path / "small", 128)
    large, large_size = peak_bytes(tmp_path / "large", 1024)
    grown = large_size - small_size
    assert grown > 2_500_000
    # What does grow: a byte per label, some tens of bytes per example and per piece.
    assert large - small < 0.15 * grown, f"{small:,} to {large:,} bytes, codes grew by {grown:,}"
