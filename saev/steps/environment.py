"""Reads environment variables from the cluster's Secret and ConfigMap, mounted as folders."""

import contextlib
import os
import typing as tp
from pathlib import Path

from saev.config.environment import CONFIG_ENV, CONFIG_MOUNT, SECRET_ENV, SECRET_MOUNT

FOLDERS: tuple[tuple[Path, tuple[str, ...]], ...] = (
    (Path(SECRET_MOUNT), SECRET_ENV),
    (Path(CONFIG_MOUNT), CONFIG_ENV),
)
"""The folders, and the keys that are read from each."""


def take(folders: tp.Sequence[tuple[Path, tp.Sequence[str]]] | None = None) -> None:
    """Put the mounted values into the environment of this process.

    They replace variables that exist already, as a pod's variables replace those of its image. The
    folders and any of the keys may be missing.

    Args:
        folders: pairs of a folder and its keys; by default those of a pod.
    """
    for folder, keys in FOLDERS if folders is None else folders:
        for key in keys:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.environb[key.encode()] = (folder / key).read_bytes()
