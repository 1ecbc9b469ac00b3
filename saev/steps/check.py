"""Checks whether this machine can use a storage root with its credentials."""

import contextlib
import logging
import uuid

from saev import storage
from saev.errors import StorageError

logger = logging.getLogger(__name__)


def check_root(root: str, dataset: str = "") -> list[str]:
    """Write, read, create twice and delete a small object below a root; list a dataset.

    Returns:
        The URLs that were checked.

    Raises:
        StorageError: one of these failed; the message says which, and what to do.
    """
    nonce = uuid.uuid4().hex
    probe = storage.join(root, f"{storage.TMP_PREFIX}check-{nonce[:12]}")
    storage.write_text(probe, nonce)  # if this fails, there is nothing to delete
    logger.info("ok: write")
    try:
        if storage.read_text(probe) != nonce:
            raise StorageError(f"{probe} does not hold what was just written to it.")
        logger.info("ok: read")
        if storage.create(probe, b"another"):
            raise StorageError(
                f"{root} lets an object be created that exists already, so claims of datasets are "
                "not safe: two schedules could process the same one. Use a store with conditional "
                "writes."
            )
        logger.info("ok: create only if absent")
    except BaseException:
        with contextlib.suppress(StorageError):  # the first error is the one to report
            storage.delete(probe)
        raise
    storage.delete(probe)
    logger.info("ok: delete")
    if dataset:
        n = len(storage.list_dir(dataset))
        logger.info("ok: list %s (%d entries)", dataset, n)
    return [storage.normalize(root), *([storage.normalize(dataset)] if dataset else [])]
