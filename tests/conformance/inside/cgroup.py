"""Which version of cgroup a pod sees, and whether its supervisor can read the memory's limit."""

import json
from pathlib import Path

from saev.steps import memory

ROOT = Path("/sys/fs/cgroup")
version = "v2" if (ROOT / "cgroup.controllers").exists() else "v1"
group = ROOT / "memory.oom.group"
together = f", memory.oom.group {group.read_text().strip()}" if group.exists() else ""
seen = memory.look()
limit = f", limit {seen.limit / 2**20:.0f} MiB" if seen else ", no limit to be seen"
print(json.dumps(version + together + limit))
