"""Errors of storage: one sentence that explains each, and which operations are retried."""

import contextlib
import errno
import functools
import importlib
import socket
import ssl
import sys
import time
import typing as tp
from collections.abc import Callable, Iterator

import tenacity

from saev.errors import ModelError, StorageError
from saev.storage import answers, waiting

_BROKEN_TLS = (
    None, "UNEXPECTED_EOF_WHILE_READING", "BAD_RECORD_MAC", "SSLV3_ALERT_BAD_RECORD_MAC",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
)  # fmt: skip

P = tp.ParamSpec("P")
T = tp.TypeVar("T")
ErrorT = tp.TypeVar("ErrorT", bound=BaseException)

# Importing botocore and aiohttp takes longer than the rest of this package, and most commands need
# neither. No error of a library can be met before somebody has imported it.
_LIBRARIES = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),  # these are not OSErrors
    ("botocore.parsers", ("ResponseParserError",)),
    ("aiohttp", ("ClientError",)),
)


def _imported(name: str) -> tp.Any:
    """A module that is imported already, else None. Waits for a thread that is importing it."""
    return importlib.import_module(name) if name in sys.modules else None


def _of_libraries() -> tuple[type[BaseException], ...]:
    """Errors of those libraries that are imported."""
    modules = [(_imported(name), errors) for name, errors in _LIBRARIES]
    return tuple(getattr(module, e) for module, errors in modules if module for e in errors)


def _expected() -> tuple[type[BaseException], ...]:
    """Errors of fsspec backends for a failed request."""
    return (OSError, ValueError, *_of_libraries())


# --- Explanations --------------------------------------------------------------------------


def explain(err: BaseException, url: str, doing: str) -> StorageError:
    """The StorageError for an error of the operating system or of a library."""
    attempts = getattr(err, "saev_attempts", "")
    error = StorageError(f"Cannot {doing} {url}: {_reason(err, url, doing)}{attempts}")
    error.passing = is_passing(err)
    if attempts:
        error.saev_attempts = attempts  # type: ignore[attr-defined]
    return error


def _reason(err: BaseException, url: str, doing: str) -> str:
    answer = answer_of(err)
    if answer is not None:
        return answers.explanation(answer, url, doing)
    tls, no_host = _innermost(err, ssl.SSLError), _innermost(err, socket.gaierror)
    if tls is not None:
        return _of_tls(tls, url)
    if no_host is not None:
        return (
            f"the host{answers.endpoint(url)} is not known ({no_host.strerror}). Check the name of "
            "the endpoint (AWS_ENDPOINT_URL) and the network."
        )
    return _of_connection(err, url) or _of_system(err)


def _of_system(err: BaseException) -> str:
    code = getattr(err, "errno", None)
    if isinstance(err, FileNotFoundError) or code == errno.ENOENT:
        return "it does not exist. Check the path."
    if isinstance(err, PermissionError) or code in (errno.EACCES, errno.EPERM):
        return "permission denied. Check its owner or credentials."
    if code == errno.ENOSPC:
        return (
            "no space left on the device. Free some space and run the same command again; "
            "finished work is kept."
        )
    if code == errno.EROFS:
        return "the file system is read-only. Choose another root."
    if code == errno.EDQUOT:
        return "the disk quota is used up."
    if isinstance(err, NotADirectoryError | FileExistsError):
        return f"a file stands where a folder is needed ({err})."
    if isinstance(err, IsADirectoryError):
        return "it is a folder, expected a file."
    return f"{type(err).__name__}: {err}"


def _of_tls(err: ssl.SSLError, url: str) -> str:
    endpoint = answers.endpoint(url)
    if isinstance(err, ssl.SSLCertVerificationError):
        return (
            f"the certificate{endpoint} cannot be trusted ({err.verify_message}). If the store has "
            "its own certificate authority, set AWS_CA_BUNDLE to the file with that authority's "
            "certificate (PEM)."
        )
    if err.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return (
            f"the endpoint{endpoint} does not speak TLS ({err.reason}). Use http:// in "
            "AWS_ENDPOINT_URL, or the port that does."
        )
    return (
        f"TLS{endpoint} failed: {err}. Check the endpoint (AWS_ENDPOINT_URL); AWS_CA_BUNDLE names "
        "a file of certificates to trust."
    )


def _of_connection(err: BaseException, url: str) -> str:
    """Explanation if the store could not be asked, else empty."""
    if url.startswith(("s3://", "s3a://")) and _is_of_network(err):
        # fsspec wraps our error in one with an empty message.
        message = str(err) or str(err.__cause__ or "")
        return _no_answer(url, message or type(err).__name__)
    boto = _imported("botocore.exceptions")
    if boto is None:
        return ""
    if isinstance(err, boto.NoCredentialsError | boto.PartialCredentialsError):
        return (
            f"no credentials were found ({str(err).rstrip('.')}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile (AWS_PROFILE) or the role of the pod; a public "
            "bucket needs FSSPEC_S3_ANON=true."
        )
    if isinstance(
        err,
        boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ConnectionClosedError
        | boto.ReadTimeoutError,
    ):  # fmt: skip
        return _no_answer(url, type(err).__name__)
    return ""


def _no_answer(url: str, reason: str) -> str:
    return (
        f"there is no answer{answers.endpoint(url)} ({reason}). Check the endpoint "
        "(AWS_ENDPOINT_URL), the network, and whether the store runs."
    )


def _is_of_network(err: BaseException) -> bool:
    unreachable = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED)
    return isinstance(err, ConnectionError | TimeoutError) or (
        isinstance(err, OSError) and err.errno in unreachable
    )


def answer_of(err: BaseException) -> answers.Answer | None:
    """The answer of an S3 store that caused an error; None if there was none."""
    boto = _imported("botocore.exceptions")
    for cause in _causes(err):
        if isinstance(cause, answers.RefusedError):
            return cause.answer
        if boto is not None and isinstance(cause, boto.ClientError):
            return answers.of_client_error(cause)
    return None


def _causes(err: BaseException, *, during: bool = False) -> Iterator[BaseException]:
    """An error and its causes, outermost first.

    Args:
        err: the error.
        during: follow ``__context__`` too, where there is no ``__cause__``.
    """
    seen: list[BaseException] = []
    queue: list[tp.Any] = [err]
    while queue:
        found = queue.pop(0)
        if not isinstance(found, BaseException) or found in seen:
            continue
        seen.append(found)
        yield found
        queue += [found.__cause__ or (found.__context__ if during else None)]
        queue += [getattr(found, "kwargs", {}).get("error")]
        queue += [getattr(found, "certificate_error", None), getattr(found, "os_error", None)]


def _innermost(err: BaseException, kind: type[ErrorT]) -> ErrorT | None:
    """The innermost error of a type. aiohttp wraps errors in subclasses that lack the details."""
    found = [cause for cause in _causes(err, during=True) if isinstance(cause, kind)]
    return found[-1] if found else None


@contextlib.contextmanager
def explained(url: str, doing: str, *, foreign_code: bool = False) -> Iterator[None]:
    """Turn errors of the block into a StorageError of one sentence.

    Warnings about retries inside the block name the same operation.

    Args:
        url: the location in the message.
        doing: the verb in the message.
        foreign_code: the block also runs the caller's code, whose ValueErrors are not changed.
    """
    before = waiting.operation.get()
    waiting.operation.set((url, doing))
    try:
        yield
    except StorageError:
        raise
    except _expected() as err:
        if foreign_code and isinstance(err, ValueError) and not isinstance(err, OSError):
            raise
        raise explain(err, url, doing) from err
    finally:
        waiting.operation.set(before)


# --- Retries -------------------------------------------------------------------------------


def is_passing(err: BaseException) -> bool:
    """Whether the same operation may succeed later without a repair.

    Accepts errors of :mod:`saev.storage` and errors of libraries.
    """
    if isinstance(err, StorageError | ModelError):
        return err.passing
    answer = answer_of(err)
    if answer is not None:
        return answer.passes
    tls = _innermost(err, ssl.SSLError)
    if tls is not None:  # a broken connection passes, a bad certificate does not
        return not isinstance(tls, ssl.SSLCertVerificationError) and tls.reason in _BROKEN_TLS
    if isinstance(err, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return False
    if _is_of_network(err):
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
    boto = _imported("botocore.exceptions")
    if boto is not None and isinstance(err, boto.BotoCoreError | boto.ClientError):
        return isinstance(
            err,
            boto.HTTPClientError
            | boto.ConnectionError
            | boto.IncompleteReadError
            | boto.ResponseStreamingError,
        )
    return isinstance(err, _of_libraries())


def retry(call: Callable[P, T]) -> Callable[P, T]:
    """Decorator: repeat a call while its errors are passing.

    The retries end SAEV_PATIENCE_S seconds after the start of the fault (:class:`Patience`). If
    a request inside the call was retried for so long, the call is not repeated as well.
    """

    @functools.wraps(call)
    def retried(*args: P.args, **kwargs: P.kwargs) -> T:
        start, patience = time.monotonic(), waiting.Patience(waiting.patience_s())

        def is_over(state: tenacity.RetryCallState) -> bool:
            patience.failed(start)
            return time.monotonic() + state.upcoming_sleep >= patience.end(start)

        with waiting.limited(patience):
            retrying = tenacity.Retrying(
                retry=tenacity.retry_if_exception(
                    lambda err: is_passing(err) and not hasattr(err, "saev_attempts")
                ),
                wait=tenacity.wait_exponential_jitter(initial=0.1, max=10),
                stop=is_over,
                before_sleep=lambda state: _warn(state, patience.end(start)),
                reraise=True,
            )
            try:
                return retrying(call, *args, **kwargs)
            except Exception as err:
                n = retrying.statistics.get("attempt_number", 1)
                if n > 1 and is_passing(err):
                    spent = time.monotonic() - start
                    err.saev_attempts = f" It was tried {n} times in {spent:.0f} s."  # type: ignore[attr-defined]
                raise

    return retried


def _warn(state: tenacity.RetryCallState, end: float) -> None:
    """Warn of a fault that has lasted for some seconds."""
    err = state.outcome.exception() if state.outcome else None
    url, doing = waiting.operation.get()
    if err is None or not url or (state.seconds_since_start or 0.0) < waiting.QUIET_S:
        return
    waiting.warn(url, str(explain(err, url, doing)), end)
