"""SIGKILL at random moments, then the same command again: the same bytes, nothing left over."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from inference.world import contents, make_world

from saev import inference
from saev.config import InferenceConfig

N_KILLS = 20
MAX_ATTEMPTS = 120


def start(cfg: InferenceConfig) -> int:
    """Run the stage in a fork of this process, which has everything imported; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        inference.run(cfg)
        status = 0
    finally:
        os._exit(status)


def was_killed(pid: int) -> bool:
    """Wait for a process. False if it had already ended well."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.fixture
def one_thread():
    """OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path: Path, one_thread) -> None:
    world = make_world(tmp_path, n_examples=60, per_shard=5)
    cfg = InferenceConfig(run=world.run)

    def to(name: str) -> InferenceConfig:
        return cfg.model_copy(update={"out": str(tmp_path / name)})

    inference.run(to("whole"))
    whole = contents(tmp_path / "whole")
    began = time.monotonic()
    assert not was_killed(start(to("timed")))
    duration = time.monotonic() - began

    moments = random.Random(0)
    n_killed = n_unfinished = 0
    for attempt in range(MAX_ATTEMPTS):
        # Some folders are hit twice: the second run then dies while it resumes.
        out = to(f"out{attempt // 2}")
        pid = start(out)
        time.sleep(moments.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        n_killed += was_killed(pid)
        n_unfinished += not (Path(out.out) / "metrics.json").exists()
        if attempt % 2:
            inference.run(out)
            assert contents(out.out) == whole
        if n_killed >= N_KILLS and attempt % 2:
            break
    assert n_killed >= N_KILLS
    assert n_unfinished >= N_KILLS // 4
