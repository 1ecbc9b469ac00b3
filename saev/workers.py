"""Two workers on one item: the slower one ends well if the item is done."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from saev.errors import StorageError

PUBLISHED = "Another worker has published it meanwhile"


@contextlib.contextmanager
def unless_done(
    logger: logging.Logger,
    done: Callable[[], bool],
    *,
    said: str = PUBLISHED,
    errors: tuple[type[Exception], ...] = (StorageError,),
) -> Iterator[None]:
    """Errors of the block count only if its work is not done.

    Another worker may have done the same work, and removed what this one needed.

    Args:
        logger: where it is said that the work was done by somebody else.
        done: looks at the storage.
        said: how the log line begins.
        errors: what may come of the other worker.

    Raises:
        Exception: one of ``errors``, if the work is not done.
    """
    try:
        yield
    except errors as err:
        if not done():
            raise
        logger.warning("%s%s", said, f". Here: {err}" if str(err) else ".")
