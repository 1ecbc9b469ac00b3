"""Lists what is below a root, with one listing for each of its parts."""

import re
import typing as tp
from collections.abc import Iterable

from saev import storage
from saev.errors import ConfigError
from saev.storage import Object

SHARDS, RUNS, RESUME, DATASETS = "shards", "runs", "resume", "datasets"
_HASH = re.compile(r"[0-9a-f]{12}|[0-9a-f]{16}")
"""Names of runs and of shards. Folders with other names are not saev's."""


class Folder(tp.NamedTuple):
    """A folder and all files below it."""

    url: str
    objects: tuple[Object, ...]
    """All files, including temporary ones."""
    modified: float
    """Newest change of any of them, seconds since the epoch."""

    @classmethod
    def of(cls, url: str, objects: Iterable[Object]) -> "Folder":
        """Make it from objects whose keys are relative to the folder."""
        found = tuple(objects)
        return cls(url, found, max((o.modified for o in found), default=0.0))

    @property
    def name(self) -> str:
        """Last component."""
        return storage.name(self.url)

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(o.size for o in self.objects)

    def has(self, key: str) -> bool:
        """Whether there is such a file."""
        return any(o.key == key for o in self.objects)

    def folders(self, below: str = "") -> dict[str, "Folder"]:
        """Folders one level down (below a sub-folder) that hold a file, by name."""
        prefix = f"{below}/" if below else ""
        groups: dict[str, list[Object]] = {}
        for o in self.objects:
            head, slash, rest = o.key.removeprefix(prefix).partition("/")
            if slash and o.key.startswith(prefix):
                groups.setdefault(head, []).append(o._replace(key=rest))
        base = storage.join(self.url, below)
        return {name: Folder.of(storage.join(base, name), group) for name, group in groups.items()}

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link. Its target may be outside of the root."""
        path = storage.local_path(self.url)
        return path is not None and path.is_symlink()


class Snapshot(tp.NamedTuple):
    """A root."""

    url: str
    shards: dict[str, Folder]
    """Shards folders by name."""
    runs: dict[str, Folder]
    """Run folders by name."""
    resume: dict[str, Folder]
    """Folders of resume points by the name of their group."""
    temporaries: dict[str, Object]
    """Unfinished writes by URL."""
    claims: dict[str, str]
    """URL of each folder of claims, with the name of the dataset's folder that it is in."""


def scan(root: str) -> Snapshot:
    """List a root.

    Raises:
        StorageError: it does not exist or a part of it cannot be listed.
        ConfigError: it holds neither shards nor runs nor records of datasets.
    """
    url = storage.normalize(root)
    there = {entry.name: entry for entry in storage.list_dir(url)}
    if not {SHARDS, RUNS, DATASETS} & there.keys():
        raise ConfigError(
            f"{url} holds neither {SHARDS} nor {RUNS} nor {DATASETS}, so it is no root of saev. "
            "Give the folder that `saev run --root` was given (the parent of --shards-root and "
            "--runs-root)."
        )
    parts = {
        name: Folder.of(storage.join(url, name), ())
        if name not in there
        else Folder.of(there[name].url, sorted(storage.walk(there[name].url, temporary=True)))
        for name in (SHARDS, RUNS, DATASETS)
    }
    temporaries = {
        storage.join(part.url, o.key): o
        for part in parts.values()
        for o in part.objects
        if storage.name(o.key).startswith(storage.TMP_PREFIX)
    }
    return Snapshot(
        url,
        _ours(parts[SHARDS]),
        _ours(parts[RUNS]),
        _ours(parts[RUNS], RESUME),
        temporaries,
        _claims(parts[DATASETS]),
    )


def _claims(datasets: Folder) -> dict[str, str]:
    """Folders of claims at any depth below a dataset's `claims`."""
    found = {}
    for o in datasets.objects:
        name, *between, file = o.key.split("/")
        if between[:1] == ["claims"] and file.endswith(".json"):
            found[storage.join(datasets.url, name, *between)] = name
    return found


def _ours(part: Folder, below: str = "") -> dict[str, Folder]:
    """The folders that saev made. On a disk also empty ones, which a deletion may have left."""
    found = {n: f for n, f in part.folders(below).items() if _HASH.fullmatch(n)}
    path = storage.local_path(storage.join(part.url, below))
    if path is not None and path.is_dir():
        for child in path.iterdir():
            if child.name not in found and _HASH.fullmatch(child.name) and child.is_dir():
                found[child.name] = Folder(str(child), (), child.lstat().st_mtime)
    return found
