"""Memory does not grow with the dataset."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from inference.world import make_world

from saev import inference
from saev.config import InferenceConfig
from saev.inference import coactivation, codes, concepts, tabulate, topk
from saev.inference import job as job_module
from saev.inference import part as part_module
from saev.parquet import writer
from saev.storage import checksums


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path) -> None:
    # In a fresh process: other tests grow tables of the interpreter, which then double here.
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    ran = subprocess.run(command, env=env, capture_output=True, check=True)
    found = json.loads(ran.stdout)
    (small, small_size), (large, large_size) = found
    grown = large_size - small_size
    assert grown > 1_250_000
    # What does grow: a byte per label, some tens of bytes per example and per piece, and for each
    # example what the tables say of it, and its embedding.
    assert large - small < 0.4 * grown, f"{small:,} to {large:,} bytes, codes grew by {grown:,}"


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
    return peak, (Path(url) / "token_acts.npz").stat().st_size


def lower_bounds() -> None:
    """Bounds in proportion to the small data, so that every one of them is reached."""
    part_module._PIECE_ENTRIES = 8_000
    topk._COMPACT_AT = 4_000
    job_module._MAX_LATENT_VALUES = 50_000
    codes._READERS = 2
    checksums._CHUNK = 50_000
    align = concepts.align
    concepts.align = lambda *args: align(*args, 3_000)
    tabulate.MAX_ENTRIES = 3_000
    coactivation.MAX_TOKENS = 4_000
    writer.GROUP_ROWS = writer.SPLIT_ROWS = 2_000


if __name__ == "__main__":
    lower_bounds()
    place = Path(sys.argv[1])
    peak_bytes(place / "warm", 64)  # imports and caches
    found = [peak_bytes(place / str(n), n) for n in (128, 512)]
    sys.stdout.write(json.dumps(found))
