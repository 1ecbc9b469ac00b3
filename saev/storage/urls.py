"""Names of places, and the file system behind each."""

import os
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from saev.errors import StorageError

TMP_PREFIX = ".tmp-"
"""Names that start so are unfinished local writes; readers and listings skip them."""


def normalize(url: str | os.PathLike) -> str:
    """Canonical form: local paths become absolute bare paths, other URLs lose a trailing slash.

    Equal places give equal strings, so the result may be hashed or compared.
    """
    text = os.fspath(url)
    if not text:
        raise StorageError(
            "An empty URL was given; expected a path or a URL such as s3://bucket/x."
        )
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        scheme, rest = text.split("://", 1)
        if scheme == "memory":  # its own listings put a slash before the first component
            rest = rest.lstrip("/")
        return f"{scheme}://{rest.rstrip('/')}"
    return str(Path(os.path.abspath(os.path.expanduser(text))))  # noqa: PTH100, PTH111 - no symlink walk


def join(url: str | os.PathLike, *parts: str) -> str:
    """``url`` with ``parts`` appended, separated by single slashes."""
    base = normalize(url)
    tail = "/".join(p.strip("/") for p in parts if p.strip("/"))
    if not tail:
        return base
    return base + tail if base.endswith("/") else f"{base}/{tail}"


def name(url: str | os.PathLike) -> str:
    """Last path component."""
    return normalize(url).rstrip("/").rsplit("/", 1)[-1]


def parent(url: str | os.PathLike) -> str:
    """The folder that holds ``url``."""
    text = normalize(url)
    if "://" in text:
        scheme, rest = text.split("://", 1)
        return f"{scheme}://{rest.rsplit('/', 1)[0]}" if "/" in rest else text
    return str(Path(text).parent)


def local_path(url: str | os.PathLike) -> Path | None:
    """The local path that ``url`` names, or None if it is remote."""
    text = normalize(url)
    return None if "://" in text else Path(text)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as err:
        scheme = url.split("://", 1)[0]
        remedy = {"s3": "pip install 'saev[s3]'", "gs": "pip install 'saev[gs]'"}.get(scheme)
        hint = f" Install its backend: {remedy}." if remedy else f" ({err})"
        raise StorageError(f"Cannot open {url}: scheme '{scheme}' is not available.{hint}") from err


def with_scheme(fs: fsspec.AbstractFileSystem, key: str) -> str:
    return (
        normalize(key) if isinstance(fs, LocalFileSystem) else normalize(fs.unstrip_protocol(key))
    )
