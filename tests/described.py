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


def other_digit(place: Path, key: str) -> None:
    """Change the last digit of the first value of a key: JSON as valid as before."""
    text = place.read_text()
    start = text.index(f'"{key}"')
    stop = min(n for n in (text.find(end, start) for end in (",", "}", "\n")) if n > 0)
    at = max(n for n in range(start, stop) if text[n].isdigit())
    place.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    assert json.loads(place.read_text()) != json.loads(text)


def list_again(place: Path, closing: str) -> None:
    """Correct what a folder's closing object says of an object in it that a test has changed."""
    found = storage.read_sealed(place.parent / closing)
    files = {**(found.files or {}), place.name: storage.Listed.of(place.read_bytes())}
    storage.write_json(place.parent / closing, storage.seal(found.record, files))


def files_below(url: str | Path) -> list[str]:
    """URLs of all files below a folder, sorted; none if the folder is missing."""
    return sorted(storage.join(url, o.key) for o in storage.walk(url, missing_ok=True))


def list_files(url: str) -> None:
    """Write files.json, as `saev shards` does before it publishes."""
    files = {
        entry.name: storage.Listed.of(storage.read_bytes(entry.url))
        for entry in storage.list_dir(url)
        if not entry.is_dir and entry.name != "files.json" and not entry.name.startswith("acts")
    }
    storage.write_json(storage.join(url, "files.json"), storage.seal({}, files))


def as_0_1_0(shards: str) -> str:
    """Make of a shards folder what version 0.1.0 left, except for its name, which is no hash."""
    old = Path(shards).rename(Path(shards).with_name("recorded-by-0.1.0"))
    raw = json.loads((old / "metadata.json").read_text())
    plain = {key: raw[key] for key in raw if key not in ("network", "weights", "versions")}
    (old / "metadata.json").write_text(json.dumps(plain))
    (old / "files.json").unlink()
    shutil.rmtree(old / "asked", ignore_errors=True)
    return str(old)
