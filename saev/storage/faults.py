"""What goes wrong, in one sentence each, and what is worth another try."""

import contextlib
import errno
import functools
import socket
import ssl
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

_EXPECTED: tuple[type[BaseException], ...] = (
    OSError,
    ValueError,
)  # what fsspec backends raise for a failed request
_BOTO: tp.Any = None
try:  # botocore's errors are not OSErrors; NoCredentialsError is the one a new user meets
    import botocore.exceptions
    import botocore.parsers
    from aiohttp import ClientError as _HttpError

    _BOTO = botocore.exceptions
    _ParserError = botocore.parsers.ResponseParserError
    _EXPECTED = (*_EXPECTED, _BOTO.BotoCoreError, _BOTO.ClientError, _ParserError, _HttpError)
except ImportError:
    pass


# --- In words ------------------------------------------------------------------------------


def explain(err: BaseException, url: str, doing: str) -> StorageError:
    """One sentence for the operating system's or the object store's answer."""
    tried = getattr(err, "saev_tried", "")
    said = StorageError(f"Cannot {doing} {url}: {_sentence(err, url, doing)}{tried}")
    said.passing = is_passing(err)
    return said


def _sentence(err: BaseException, url: str, doing: str) -> str:
    answer = answer_of(err)
    if answer is not None:
        return answers.sentence(answer, url, doing)
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
            "a certificate authority of its own, AWS_CA_BUNDLE has to name the file with that "
            "authority's certificate (PEM)."
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
    """What is wrong before a store can answer; empty if it is something else."""
    if url.startswith(("s3://", "s3a://")) and _is_of_network(err):
        said = str(err) or str(err.__cause__ or "")  # fsspec hides ours in one that says nothing
        return _no_answer(url, said or type(err).__name__)
    if _BOTO is None:
        return ""
    if isinstance(err, _BOTO.NoCredentialsError | _BOTO.PartialCredentialsError):
        return (
            f"no credentials were found ({str(err).rstrip('.')}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile (AWS_PROFILE) or the role of the pod; a public "
            "bucket needs FSSPEC_S3_ANON=true."
        )
    if isinstance(
        err,
        _BOTO.EndpointConnectionError | _BOTO.ConnectTimeoutError | _BOTO.ConnectionClosedError
        | _BOTO.ReadTimeoutError,
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
    """What an S3 store answered, if that is the reason."""
    for cause in _causes(err):
        if isinstance(cause, answers.RefusedError):
            return cause.answer
        if _BOTO is not None and isinstance(cause, _BOTO.ClientError):
            return answers.of_client_error(cause)
    return None


def _causes(err: BaseException, *, during: bool = False) -> Iterator[BaseException]:
    """An error and what it was made from, outermost first; maybe also what it was raised during."""
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
    """aiohttp's errors are also of the kind of what they were made from, without its details."""
    found = [cause for cause in _causes(err, during=True) if isinstance(cause, kind)]
    return found[-1] if found else None


@contextlib.contextmanager
def explained(url: str, doing: str, *, of_others: bool = False) -> Iterator[None]:
    """Errors of the block in one sentence; says the same while it tries again.

    Args:
        url: what the sentence is about.
        doing: verb.
        of_others: the block also holds code that is not ours, whose ValueErrors keep their names.
    """
    before = waiting.operation.get()
    waiting.operation.set((url, doing))
    try:
        yield
    except StorageError:
        raise
    except _EXPECTED as err:
        if of_others and isinstance(err, ValueError) and not isinstance(err, OSError):
            raise
        raise explain(err, url, doing) from err
    finally:
        waiting.operation.set(before)


# --- Again ---------------------------------------------------------------------------------


def is_passing(err: BaseException) -> bool:
    """Whether the same operation may succeed later, without anybody mending anything.

    For errors of every kind: what :mod:`saev.storage` raises, and what libraries do.
    """
    if isinstance(err, StorageError | ModelError):
        return err.passing
    answer = answer_of(err)
    if answer is not None:
        return answer.passes
    tls = _innermost(err, ssl.SSLError)
    if tls is not None:  # a broken connection passes, and nothing of a certificate
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
    if _BOTO is None:
        return False
    return isinstance(
        err,
        _BOTO.HTTPClientError
        | _BOTO.ConnectionError
        | _BOTO.IncompleteReadError
        | _BOTO.ResponseStreamingError
        | _ParserError
        | _HttpError,
    )


def retry(call: Callable[P, T]) -> Callable[P, T]:
    """``call``, tried again while its errors are passing and patience lasts."""

    @functools.wraps(call)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        start, patience = time.monotonic(), waiting.patience_s()
        with waiting.patience(patience):
            again = tenacity.Retrying(
                retry=tenacity.retry_if_exception(is_passing),
                wait=tenacity.wait_exponential_jitter(initial=0.1, max=10),
                stop=tenacity.stop_before_delay(patience),
                before_sleep=functools.partial(_tell, end=start + patience),
                reraise=True,
            )
            try:
                return again(call, *args, **kwargs)
            except Exception as err:
                n = again.statistics.get("attempt_number", 1)
                if n > 1 and is_passing(err):
                    spent = time.monotonic() - start
                    err.saev_tried = f" It was tried {n} times in {spent:.0f} s."  # type: ignore[attr-defined]
                raise

    return tried


def _tell(state: tenacity.RetryCallState, end: float) -> None:
    """Say what is wrong, if it has been so for some seconds."""
    err = state.outcome.exception() if state.outcome else None
    url, doing = waiting.operation.get()
    if err is None or not url or (state.seconds_since_start or 0.0) < waiting.QUIET_S:
        return
    waiting.tell(url, str(explain(err, url, doing)), end)
