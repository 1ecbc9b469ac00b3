"""What goes wrong, in one sentence each, and what is worth another try."""

import contextlib
import errno
import functools
import ssl
from collections.abc import Iterator

import tenacity

from saev.errors import StorageError

_READ_ATTEMPTS = 5


def explain(err: BaseException, url: str, doing: str) -> StorageError:
    """One sentence for the operating system's or the object store's answer."""
    code = getattr(err, "errno", None)
    if isinstance(err, ssl.SSLError):  # whose numbers are not the operating system's
        return StorageError(
            f"Cannot {doing} {url}: {err}. Check the endpoint; AWS_CA_BUNDLE names a file of "
            "certificates to trust."
        )
    if isinstance(err, FileNotFoundError) or code == errno.ENOENT:
        return StorageError(f"Cannot {doing} {url}: it does not exist. Check the path.")
    if isinstance(err, PermissionError) or code in (errno.EACCES, errno.EPERM):
        return StorageError(
            f"Cannot {doing} {url}: permission denied. Check its owner or credentials."
        )
    if code == errno.ENOSPC:
        return StorageError(
            f"Cannot {doing} {url}: no space left on the device. "
            "Free some space and run the same command again; finished work is kept."
        )
    if code == errno.EROFS:
        return StorageError(
            f"Cannot {doing} {url}: the file system is read-only. Choose another root."
        )
    if code == errno.EDQUOT:
        return StorageError(f"Cannot {doing} {url}: the disk quota is used up.")
    if isinstance(err, NotADirectoryError | FileExistsError):
        return StorageError(
            f"Cannot {doing} {url}: a file stands where a folder is needed ({err})."
        )
    if isinstance(err, IsADirectoryError):
        return StorageError(f"Cannot {doing} {url}: it is a folder, expected a file.")
    return StorageError(f"Cannot {doing} {url}: {type(err).__name__}: {err}")


_EXPECTED: tuple[type[BaseException], ...] = (
    OSError,
    ValueError,
)  # what fsspec backends raise for a failed request
try:  # botocore's errors are not OSErrors; NoCredentialsError is the one a new user meets
    from botocore.exceptions import BotoCoreError, ClientError

    _EXPECTED = (*_EXPECTED, BotoCoreError, ClientError)
except ImportError:
    pass


@contextlib.contextmanager
def explained(url: str, doing: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except _EXPECTED as err:
        raise explain(err, url, doing) from err


def transient(err: BaseException) -> bool:
    """Whether the same request may succeed if it is sent again."""
    if isinstance(
        err,
        StorageError | FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError,
    ):
        return False
    if isinstance(err, ssl.SSLError):
        return not isinstance(err, ssl.SSLCertVerificationError)
    if isinstance(err, ConnectionError | TimeoutError):
        return True
    if isinstance(err, OSError):
        return err.errno in (
            None,
            errno.EIO,
            errno.ETIMEDOUT,
            errno.EBUSY,
            errno.EAGAIN,
            errno.ESTALE,
        )
    return False


_retry = functools.partial(
    tenacity.retry,
    retry=tenacity.retry_if_exception(transient),
    wait=tenacity.wait_exponential_jitter(initial=0.1, max=10),
    reraise=True,
)
retry_reads = _retry(stop=tenacity.stop_after_attempt(_READ_ATTEMPTS))
# Half a minute: a store that starts anew.
retry_patiently = _retry(stop=tenacity.stop_after_attempt(9))
