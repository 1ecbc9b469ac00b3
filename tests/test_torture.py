"""A sample of `make torture`."""

import random
from pathlib import Path

import pytest
from forker import Forker
from torture import stages as torture


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sample(s3: str, forker: Forker, tmp_path: Path) -> None:
    rng = random.Random(0)
    stages = torture.Stages(forker, f"{s3}/torture", tmp_path, ["shards"])
    broken = torture.break_requests(stages, "shards", "S3", 1, 0.3, rng)
    killed = torture.kill(stages, "shards", "S3", 2, rng)
    assert broken.is_good, broken
    assert broken.n_faults > 10
    assert killed.is_good, killed
    assert killed.n_kills >= 2
