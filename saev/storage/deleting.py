"""Removing objects, and what killed writers left."""

import contextlib
import fcntl
import os
import uuid
from pathlib import Path

from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from saev.storage.faults import explained
from saev.storage.looking import exists
from saev.storage.urls import TMP_PREFIX, filesystem, join, local_path, normalize
from saev.storage.writing import write_bytes


def delete(url: str | os.PathLike, *, recursive: bool = False) -> None:
    """Remove an object (or a folder). A missing one is not an error."""
    text = normalize(url)
    fs, key = filesystem(text)
    with explained(text, "delete"), contextlib.suppress(FileNotFoundError):
        if not recursive:
            fs.rm_file(key)
        elif isinstance(fs, LocalFileSystem) or not has_magic(key):
            fs.rm(key, recursive=True)
        else:  # fsspec would take the name for a pattern, and remove what matches it
            for found in [*fs.find(key), key]:
                fs.rm_file(found)
        fs.invalidate_cache(key)


def remove_empty(url: str | os.PathLike) -> None:
    """Remove a folder with nothing in it. Object stores have none; one in use stays."""
    path = local_path(url)
    if path is not None:
        with contextlib.suppress(OSError):
            path.rmdir()


def clean_temporary(url: str | os.PathLike) -> None:
    """Remove what killed local writers left in a folder. Files of living writers stay."""
    path = local_path(url)
    if path is None or not path.is_dir():
        return
    for leftover in path.glob(f"{TMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_temporary(leftover)


def remove_temporary(url: str | os.PathLike) -> bool:
    """Remove one unfinished write, unless its writer is alive; returns whether it is gone."""
    text = normalize(url)
    path = local_path(text)
    if path is None:
        delete(text)
        return not exists(text)
    with explained(text, "delete"):
        try:
            _remove_temporary(path)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
    return True


def _remove_temporary(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
        path.unlink()
    finally:
        os.close(fd)


def check_writable(url: str | os.PathLike) -> None:
    """Fail now, with one clear error, if nothing can be written below ``url``."""
    probe = join(url, f"{TMP_PREFIX}probe-{uuid.uuid4().hex[:12]}")
    write_bytes(probe, b"")
    delete(probe)
