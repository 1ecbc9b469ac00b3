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
    files = {
        path.name: storage.Listed.of(path.read_bytes())
        for path in to.iterdir()
        if path.is_file() and path.name != "files.json" and not path.name.startswith("acts")
    }
    storage.write_json(str(to / "files.json"), storage.seal({}, files))
    return str(to)
