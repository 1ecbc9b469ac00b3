"""Locations that are named inside stored files. This module decides which of them may be opened.

A folder may come from somebody else, so the names inside its files cannot be trusted. A file name
must name a file of the same folder. A URL is opened if it is a plain local folder, or if it is in
the same bucket as the file that names it. All other locations are opened only if the user names
them.
"""

import functools
import itertools
import os
import re
import typing as tp
from pathlib import Path

from saev.errors import ConfigError, CorruptDataError
from saev.storage.urls import is_chained, is_url, join, local_path, normalize

_KERNEL = ("/proc", "/sys", "/dev")
"""Folders of the kernel: reading one of their files may block, never end, or change something."""
_MEMORY = "/dev/shm"
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f]+")
_MAGIC = re.compile(r"[*?\[]")


def is_file_name(name: tp.Any) -> bool:
    """Whether a stored text is a plain file name, which cannot lead out of its folder."""
    if not isinstance(name, str) or name in (".", ".."):
        return False
    return _FILE_NAME.fullmatch(name) is not None


def inside(folder: str | os.PathLike, *names: str) -> str:
    """URL of a file below a folder that is named in a stored file.

    Raises:
        CorruptDataError: a name is not a plain file name, or a symbolic link leads out of the
            folder.
    """
    base = normalize(folder)
    for name in names:
        if not is_file_name(name):
            raise CorruptDataError(
                f"A file in {base} names {name!r}, expected the name of a file beside it. It was "
                "edited or damaged; make it again."
            )
    url = join(base, *names)
    path = local_path(url)
    if path is not None and not _is_within(path, Path(base)):
        raise CorruptDataError(
            f"{url} is a link to {os.path.realpath(path)}, outside of its folder. Put the file "
            "itself there, or make it again."
        )
    return url


def is_below(url: str, folder: str | os.PathLike) -> bool:
    """Whether a URL from a stored file is below a folder. Compares the texts of the URLs."""
    if ".." in url.split("/"):
        return False
    base = normalize(folder)
    forms = {base, *_resolved(base)}
    return any(normalize(url).startswith(form.rstrip("/") + "/") for form in forms)


@functools.lru_cache(maxsize=64)
def _resolved(folder: str) -> tuple[str, ...]:
    path = local_path(folder)
    return () if path is None else (os.path.realpath(path),)


def recorded_folder(url: tp.Any, record: str | os.PathLike, remedy: str) -> str:
    """Check the URL of a folder (or a glob pattern of folders) from a stored file.

    Args:
        url: the URL in the stored file.
        record: the stored file.
        remedy: a sentence that tells users how to name the folder themselves.

    Returns:
        The normalised URL, which may be opened. It is a folder in the same bucket as ``record``, or
        a plain local folder. The links in a local folder still need :func:`check_closed`.

    Raises:
        ConfigError: it is another location, which only the user may name.
    """
    place = normalize(record)
    if not isinstance(url, str) or not url or any(ord(c) < 32 for c in url):
        raise ConfigError(f"{place} names {url!r} where a folder's URL is expected. {remedy}")
    reason = _why_not(url, place)
    if reason:
        raise ConfigError(
            f"{place} names {url}, {reason}. A file that came from elsewhere may name any place, "
            f"so this one is opened only if you name it yourself. {remedy}"
        )
    return normalize(url)


def check_closed(folder: str | os.PathLike, record: str | os.PathLike, remedy: str) -> None:
    """Check that no symbolic link leads out of a local folder that a stored file names.

    Raises:
        ConfigError: a link does. The message names the link.
    """
    path = local_path(folder)
    if path is None:
        return
    root = os.path.realpath(_fixed(path))
    pending = [root]
    while pending:
        try:
            rows = os.scandir(pending.pop())
        except OSError:  # listing the folder later raises a better error
            continue
        with rows:
            for row in rows:
                if row.is_symlink():
                    if not _is_within(Path(row.path), Path(root)):
                        raise ConfigError(
                            f"{normalize(record)} names {normalize(folder)}, in which {row.path} "
                            f"is a link to {os.path.realpath(row.path)}, outside of it. Links out "
                            "of a folder are followed only if you name the folder yourself. "
                            f"{remedy}"
                        )
                elif row.is_dir(follow_symlinks=False):
                    pending.append(row.path)


def _why_not(url: str, record: str) -> str:
    """Why a URL from a stored file may not be opened; "" if it may."""
    if is_chained(url):
        return "which is a chain of locations"
    path = local_path(url)
    if path is None:
        return "" if _bucket(url) == _bucket(record) else "which is not in the same bucket"
    text = url.removeprefix("file://")
    if not text.startswith(("/", "~")):
        return "which is relative to a folder that is not known"
    fixed = _fixed(path)
    for form in (fixed, Path(os.path.realpath(fixed))):
        is_kernel = any(form.is_relative_to(k) for k in _KERNEL)
        if form == Path("/") or (is_kernel and not form.is_relative_to(_MEMORY)):
            return "which is no plain folder of files"
    return ""


def _fixed(path: Path) -> Path:
    """The folder above the first component with a wildcard; a path without wildcards as it is."""
    if not _MAGIC.search(str(path)) or path.exists():
        return path
    parts = itertools.takewhile(lambda part: not _MAGIC.search(part), path.parts)
    return Path(*parts)


def _bucket(url: str) -> str:
    """Scheme and bucket (or host) of a URL; "" for a local path."""
    text = normalize(url)
    if not is_url(text):
        return ""
    scheme, _, rest = text.partition("://")
    # memory:// exists only in this process, so all of it counts as one bucket.
    return scheme if scheme == "memory" else f"{scheme}://{rest.partition('/')[0]}"


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
