"""URLs, and the fsspec file system of each."""

import os
import re
import typing as tp
from pathlib import Path

import fsspec
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

from saev import distributions, secrets
from saev.errors import StorageError
from saev.storage.waiting import SILENT_S

TMP_PREFIX = ".tmp-"
"""Prefix of the names of unfinished local writes, which readers and listings skip."""

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
"""The start of a URL, including fsspec's chains (simplecache::s3://…)."""
_CHAINED = re.compile(rf"::{_URL.pattern}", re.IGNORECASE)
_ARCHIVES = ("zip://", "tar://", "libarchive://", "reference://", "dir://")
"""Schemes that may be chained to a local path (zip://a.png::/data/x.zip)."""


def is_url(text: str) -> bool:
    """Whether a text is a URL. Every other text is a local path, even with `::` in it."""
    return _URL.match(text) is not None


def is_chained(url: str) -> bool:
    """Whether a URL is a chain of fsspec, such as a file in an archive. `::` in a key is no
    chain."""
    return _CHAINED.search(url) is not None or (url.startswith(_ARCHIVES) and "::" in url)


def normalize(url: str | os.PathLike) -> str:
    """Canonical form: local paths become absolute bare paths, other URLs lose a trailing slash.

    Equal locations give equal strings, so the result may be hashed or compared.

    Raises:
        StorageError: it is empty, or contains a secret (a password, a signature).
    """
    text = os.fspath(url)
    if not text:
        raise StorageError(
            "An empty URL was given; expected a path or a URL such as s3://bucket/x."
        )
    if text.startswith("file://"):
        text = text[len("file://") :]
    if is_url(text):
        if secrets.holds_key(text):
            raise StorageError(secrets.refusal(text))
        scheme, rest = text.split("://", 1)
        if scheme == "memory":  # listings of memory:// begin keys with a slash
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
    if is_url(text):
        scheme, rest = text.split("://", 1)
        return f"{scheme}://{rest.rsplit('/', 1)[0]}" if "/" in rest else text
    return str(Path(text).parent)


def local_path(url: str | os.PathLike) -> Path | None:
    """The local path that ``url`` names, or None if it is remote."""
    text = normalize(url)
    return None if is_url(text) else Path(text)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a normalised URL, and the object's key in that file system.

    fsspec.core.url_to_fs is used for chains only, because it treats every `::` as a chain.
    """
    if not is_url(url):
        return LocalFileSystem(), url
    try:
        if is_chained(url):
            fs, key = fsspec.core.url_to_fs(url)
        else:
            cls = fsspec.get_filesystem_class(url.split("://", 1)[0])
            fs, key = cls(**cls._get_kwargs_from_urls(url)), cls._strip_protocol(url)
    except (ImportError, ValueError) as err:
        scheme = url.split("://", 1)[0]
        hint = f" ({err})"
        if scheme in ("s3", "gs"):
            hint = f" Install its backend: {distributions.install(scheme)}."
        raise StorageError(f"Cannot open {url}: scheme '{scheme}' is not available.{hint}") from err
    _set_up(fs)
    return fs, key


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is that of s3fs."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "s3" in protocols


def _set_up(fs: tp.Any) -> None:
    """Set the time limit and the number of attempts of requests to S3.

    By default s3fs sends every request five times, and botocore sends each of these five times.
    Instead, :mod:`saev.storage.faults` repeats requests and tells the user. Botocore's second
    attempt is kept, because one listing is many requests. Botocore settings of the user are kept.
    """
    while isinstance(fs, CachingFileSystem):
        fs = fs.fs
    if is_s3(fs) and fs.retries != 1:
        from saev.storage.s3_session import Session

        fs.retries = 1
        ours = {
            "retries": {"total_max_attempts": 2, "mode": "standard"},
            "read_timeout": SILENT_S,
            "http_session_cls": Session,
        }
        fs.config_kwargs = ours | fs.config_kwargs


def with_scheme(fs: fsspec.AbstractFileSystem, key: str) -> str:
    return (
        normalize(key) if isinstance(fs, LocalFileSystem) else normalize(fs.unstrip_protocol(key))
    )
