"""The memory that a container uses and may use, read from its control group (cgroup).

With cgroup v2, the kubelet lets the kernel end all processes of a container when its memory is used
up, including the supervisor. So the supervisor watches the memory, and ends the step before that.
"""

import contextlib
import typing as tp
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""cgroup v1 says "no limit" by a number near 2^63."""


class Memory(tp.NamedTuple):
    """Memory of a container in bytes."""

    used: int
    """Bytes in use, without the file cache, which the kernel can free."""
    limit: int

    @property
    def is_short(self) -> bool:
        """Whether the free memory is below 3% of the limit and below 256 MiB."""
        return self.limit - self.used < min(self.limit * 3 // 100, 256 << 20)


def look(root: Path = _ROOT) -> Memory | None:
    """Memory of this process's container; None without a limit or without a control group.

    Args:
        root: the folder where the control groups are mounted.
    """
    with contextlib.suppress(OSError, ValueError):
        return _version_2(root) or _version_1(root / "memory")
    return None


def _version_2(root: Path) -> Memory | None:
    """https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files"""
    try:
        limit = (root / "memory.max").read_text().strip()
    except FileNotFoundError:
        return None
    if limit == "max":
        return None
    kept = _stat(root / "memory.stat", ("inactive_file", "active_file", "slab_reclaimable"))
    return Memory(int((root / "memory.current").read_text()) - kept, int(limit))


def _version_1(root: Path) -> Memory | None:
    """https://docs.kernel.org/admin-guide/cgroup-v1/memory.html#stat-file"""
    limit = int((root / "memory.limit_in_bytes").read_text())
    if limit >= _NO_LIMIT:
        return None
    kept = _stat(root / "memory.stat", ("total_inactive_file", "total_active_file"))
    return Memory(int((root / "memory.usage_in_bytes").read_text()) - kept, limit)


def _stat(path: Path, names: tp.Collection[str]) -> int:
    """The sum of some entries of a memory.stat file."""
    rows = (line.split() for line in path.read_text().splitlines())
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)
