"""How many cores a process may use: a pod sees all of its node's and gets a share of them."""

import os

from saev import storage
from saev.errors import StorageError

CGROUPS = "/sys/fs/cgroup"


def available() -> int:
    """Cores to use, at least 1: those that the process may run on, or its CPU quota if less."""
    cores, share = _usable(), quota()
    # Rounded down: a thread too many is throttled while all others wait for it.
    return cores if share is None else max(1, min(cores, int(share)))


def quota(cgroups: str = CGROUPS) -> float | None:
    """The CPU limit of this container, in cores; None if there is none.

    Args:
        cgroups: where the container's control group is mounted, of version 2 or 1.
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
    """Where there is a CPU quota, let torch and MKL start no more threads than it has cores.

    They count the node's. With two threads on a quota of one core, training took two to four times
    as long as with one. Has an effect before torch is imported; OMP_NUM_THREADS, if set, stays.
    """
    if available() < _usable():
        os.environ.setdefault("OMP_NUM_THREADS", str(available()))


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(url: str) -> list[str]:
    try:
        return storage.read_text(url).split() if storage.exists(url) else []
    except StorageError:  # forbidden, or not what it is elsewhere
        return []
