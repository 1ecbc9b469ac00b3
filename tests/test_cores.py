"""How many threads are started."""

import os
from pathlib import Path

import pytest

from saev import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
        ({"cpu.max": "1 0\n"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.quota(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, 1), (1.0, 1), (2.9, 2), (64.0, 4), (None, 4)]
)
def test_available(monkeypatch: pytest.MonkeyPatch, share: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "quota", lambda: share)
    assert cores.available() == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 4 else str(expected))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cores.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
