"""Shards folders that say of themselves what a test wants."""

import json
import shutil
from pathlib import Path

from saev import storage


def described(shards: str, to: Path, **changes: object) -> str:
    """A copy of a shards folder with other metadata, published as this version does."""
    shutil.copytree(shards, to)  # its name is no hash that is checked
    place = to / "metadata.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
    list_files(str(to))
    return str(to)


def list_files(url: str) -> None:
    """Write files.json, as `saev shards` does before it publishes."""
    files = {
        entry.name: storage.Listed.of(storage.read_bytes(entry.url))
        for entry in storage.list_dir(url)
        if not entry.is_dir and entry.name != "files.json" and not entry.name.startswith("acts")
    }
    storage.write_json(storage.join(url, "files.json"), storage.seal({}, files))
