"""Deleting objects, and temporary files that killed writers left behind."""

import contextlib
import fcntl
import logging
import os
import typing as tp
from pathlib import Path

from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from saev.errors import StorageError
from saev.storage.answers import Answer, RefusedError
from saev.storage.faults import explained, retry
from saev.storage.looking import exists
from saev.storage.urls import TMP_PREFIX, filesystem, is_s3, join, local_path, normalize
from saev.storage.writing import write_bytes

logger = logging.getLogger(__name__)


def delete(url: str | os.PathLike, *, recursive: bool = False) -> None:
    """Delete an object, or a folder with ``recursive``. It is no error if nothing is there."""
    text = normalize(url)
    fs, key = filesystem(text)
    with explained(text, "delete"), contextlib.suppress(FileNotFoundError):
        if is_s3(fs):
            _delete_s3(fs, key, recursive=recursive)
        elif not recursive:
            retry(fs.rm_file)(key)
        elif isinstance(fs, LocalFileSystem) or not has_magic(key):
            retry(fs.rm)(key, recursive=True)
        else:  # fsspec would treat the name as a glob pattern and delete all matches
            for found in [*retry(fs.find)(key), key]:
                retry(fs.rm_file)(found)
        fs.invalidate_cache(key)


def remove_empty(url: str | os.PathLike) -> None:
    """Delete a local folder if it is empty. Object stores have no empty folders."""
    path = local_path(url)
    if path is not None:
        with contextlib.suppress(OSError):
            path.rmdir()


def clean_up(url: str | os.PathLike, *, recursive: bool = False) -> None:
    """Delete what a published result no longer needs. A failure is only a warning."""
    try:
        delete(url, recursive=recursive)
    except StorageError as err:
        logger.warning("%s Nothing depends on it, so it can be deleted later.", err)


def _delete_s3(fs: tp.Any, key: str, *, recursive: bool) -> None:
    """Delete from S3. Unlike s3fs, raise an error for keys that DeleteObjects did not delete."""
    bucket, name, _ = fs.split_path(key)
    call = retry(fs.call_s3)
    if name:
        call("delete_object", Bucket=bucket, Key=name)
    token: dict[str, str] = {}
    while recursive:
        prefix = f"{name.rstrip('/')}/" if name else ""
        page = call("list_objects_v2", Bucket=bucket, Prefix=prefix, **token)
        keys = [row["Key"] for row in page.get("Contents", [])]
        if keys:
            _delete_batch(fs, bucket, keys)
        if not page.get("IsTruncated"):
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}


@retry
def _delete_batch(fs: tp.Any, bucket: str, keys: list[str]) -> None:
    """Delete up to 1000 keys."""
    objects = [{"Key": key} for key in keys]
    answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
    refused = answer.get("Errors", [])
    if refused:
        code, message, key = (refused[0].get(name, "") for name in ("Code", "Message", "Key"))
        status = 403 if code == "AccessDenied" else 500
        raise RefusedError(Answer(status, code, message, "DeleteObjects", {"Key": key}))


def clean_temporary(url: str | os.PathLike) -> None:
    """Delete the temporary files of killed local writers. Those of running writers stay."""
    path = local_path(url)
    if path is None or not path.is_dir():
        return
    for leftover in path.glob(f"{TMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_temporary(leftover)


def remove_temporary(url: str | os.PathLike) -> bool:
    """Delete one temporary file, unless its writer is running. Returns whether it is gone."""
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
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the writer is running
        path.unlink()
    finally:
        os.close(fd)


def check_writable(url: str | os.PathLike) -> None:
    """Raise StorageError if nothing can be written below ``url``.

    All processes write the same name, so the object of a killed process is deleted by the next one.
    """
    probe = join(url, f"{TMP_PREFIX}probe")
    write_bytes(probe, b"")
    clean_up(probe)
