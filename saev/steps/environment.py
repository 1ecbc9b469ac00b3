"""The environment that the cluster's Secret and ConfigMap hold, which are mounted as folders."""

import contextlib
import os
import typing as tp
from pathlib import Path

from saev.config.environment import CONFIG_ENV, CONFIG_MOUNT, SECRET_ENV, SECRET_MOUNT

FOLDERS: tuple[tuple[Path, tuple[str, ...]], ...] = (
    (Path(SECRET_MOUNT), SECRET_ENV),
    (Path(CONFIG_MOUNT), CONFIG_ENV),
)
"""Where they are, and which of their keys count."""


def take(folders: tp.Sequence[tuple[Path, tp.Sequence[str]]] | None = None) -> None:
    """Put what is mounted into the environment of this process.

    It goes before what is there already, as variables of a pod go before those of its image and
    before those that a cloud adds to a pod. Both folders may be missing, and so may every key.

    Args:
        folders: folder → which keys count; by default those of a pod.
    """
    for folder, keys in FOLDERS if folders is None else folders:
        for key in keys:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.environb[key.encode()] = (folder / key).read_bytes()
