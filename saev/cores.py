"""The number of cores that a process may use. A pod sees all cores of its node, but has a share."""

import os

from saev import storage
from saev.errors import StorageError

CGROUPS = "/sys/fs/cgroup"


def available() -> int:
    """Number of cores to use, at least 1: the cores of the process, or its CPU quota if less."""
    cores, share = _usable(), quota()
    # Rounded down: with one thread too many, threads are throttled and others wait for them.
    return cores if share is None else max(1, min(cores, int(share)))


def quota(cgroups: str = CGROUPS) -> float | None:
    """The CPU limit of this container, in cores; None if there is none.

    Args:
        cgroups: folder at which the container's control group (version 1 or 2) is mounted.
    """
    words = _words(storage.join(cgroups, "cpu.max"))
    if not words:
        words = _words(storage.join(cgroups, "cpu/cpu.cfs_quota_us"))
        words += _words(storage.join(cgroups, "cpu/cpu.cfs_period_us"))
    # Without a limit the first word is `max` (version 2) or -1 (version 1).
    if len(words) != 2 or not all(word.isdecimal() for word in words) or words[1] == "0":
        return None
    return int(words[0]) / int(words[1])


def limit_threads() -> None:
    """Limit the threads of torch and MKL to the CPU quota, if there is one.

    By default they count the cores of the node. With two threads on a quota of one core, training
    took two to four times as long as with one thread. This must be called before torch is imported.
    OMP_NUM_THREADS is not changed if it is set.
    """
    if available() < _usable():
        os.environ.setdefault("OMP_NUM_THREADS", str(available()))


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(url: str) -> list[str]:
    try:
        return storage.read_text(url).split() if storage.exists(url) else []
    except StorageError:  # not readable, or not a file
        return []
