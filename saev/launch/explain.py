"""Turns errors of servers and connections into one sentence with a remedy."""

import collections.abc
import contextlib
import json
import re
import typing as tp

import urllib3.exceptions as http

from saev.errors import ClusterError

_LONGEST = 300


class Server(tp.NamedTuple):
    """A server, and the remedies for its errors."""

    name: str
    """Such as `Kubeflow Pipelines`."""
    address: str
    """URL, for messages."""
    who: str
    """Remedy if the server does not know the user (401)."""
    allowed: str
    """Remedy if the server knows the user and refuses the request (403)."""
    found: str
    """Remedy if nothing answers at the address, or another server does."""
    certificate: str
    """Remedy if the server's certificate is not trusted."""
    logs: str
    """Where to find the server's own log."""


class LoginPageError(Exception):
    """The answer is a web page instead of data."""


class OtherServerError(Exception):
    """The answer does not come from the expected API."""


class AnswerError(Exception):
    """The answer is an error.

    Args:
        status: the HTTP status.
        body: the answer's body.
    """

    def __init__(self, status: int, body: bytes):
        super().__init__(f"HTTP status {status}")
        self.status, self.body, self.reason = status, body, ""


@contextlib.contextmanager
def understood(response: tp.Any, url: str) -> collections.abc.Iterator[None]:
    """Wrap the generated client's parsing of an answer.

    On an answer of another server, the client raises various exceptions, or returns an empty
    object.

    Raises:
        OtherServerError: the answer is not one of the API.
    """
    try:
        if not isinstance(json.loads(response.data), dict):
            raise OtherServerError(url)
        yield
    except (ValueError, TypeError, AttributeError, KeyError, LookupError) as err:
        raise OtherServerError(url) from err


@contextlib.contextmanager
def explained(server: Server, doing: str) -> collections.abc.Iterator[None]:
    """Turn every failure of a request into one sentence.

    Args:
        server: the server that the requests inside the block go to.
        doing: what the request is for, such as `start the run`.

    Raises:
        ClusterError: a request failed. It replaces the exception of the client library.
    """
    try:
        yield
    except (LoginPageError, OtherServerError, http.HTTPError, OSError) as err:
        raise _no_answer(server, doing, err) from err
    except Exception as err:
        # Both client libraries have an own class ApiException, generated from the same template.
        is_answer = type(err).__name__ == "ApiException" and hasattr(err, "status")
        if is_answer or isinstance(err, AnswerError):
            raise _refused(server, doing, err) from err
        raise


def _no_answer(server: Server, doing: str, err: Exception) -> ClusterError:
    """The error for a request without an answer, or with one that is not from the API."""
    cause: BaseException = err
    if isinstance(err, http.MaxRetryError) and err.reason is not None:
        cause = err.reason
    place = f"{server.name} at {server.address}"
    if isinstance(cause, LoginPageError):
        return ClusterError(
            f"Cannot {doing}: {place} answers with a web page, probably its login, and not with "
            f"data. {server.who}"
        )
    if isinstance(cause, OtherServerError):
        return ClusterError(
            f"Cannot {doing}: what answers at {server.address} is not {server.name}. {server.found}"
        )
    if isinstance(cause, http.SSLError):
        return _untrusted(server, doing, str(cause))
    if isinstance(cause, http.TimeoutError | TimeoutError) and not isinstance(
        cause, http.NewConnectionError
    ):
        return ClusterError(
            f"Cannot {doing}: {place} did not answer in time. Try again, or allow it more seconds "
            "with KFP_TIMEOUT."
        )
    if isinstance(cause, http.ResponseError):  # such as too many redirects
        return ClusterError(f"Cannot {doing}: {place} keeps redirecting ({cause}). {server.who}")
    return ClusterError(
        f"Cannot {doing}: {place} cannot be reached ({_reason(cause)}). {server.found}"
    )


def _untrusted(server: Server, doing: str, reason: str) -> ClusterError:
    found = re.search(r"certificate verify failed: ([^(]+)", reason)
    why = found.group(1).strip() if found else _short(reason)
    return ClusterError(
        f"Cannot {doing}: the TLS connection to {server.name} at {server.address} failed ({why}). "
        f"{server.certificate}"
    )


_HANDSHAKE = re.compile(r"Handshake status (\d{3})")
"""The status of a refused stream (a forwarded port, a log). The client puts it only into the text:
https://github.com/kubernetes-client/python/blob/master/kubernetes/base/stream/ws_client.py"""


def _refused(server: Server, doing: str, err: tp.Any) -> ClusterError:
    """The error for an answer with an HTTP status of failure."""
    status, said = int(err.status or 0), message_of(err.body) or _short(str(err.reason or ""))
    handshake = _HANDSHAKE.match(str(err.reason or ""))
    if status == 0 and handshake:
        status = int(handshake[1])
    place = f"{server.name} at {server.address}"
    if status == 0:
        return _untrusted(server, doing, str(err.reason))
    if status == 401:
        text = f"Cannot {doing}: {place} does not know you (401). {server.who}"
    elif status == 403:
        text = f"Cannot {doing}: {place} does not allow it (403: {said}). {server.allowed}"
    elif status == 404 and _is_api(err.body):
        text = f"Cannot {doing}: it does not exist, says {place} (404: {said}). Check its name."
    elif status == 404:
        text = f"Cannot {doing}: {place} finds nothing there (404: {said}). {server.found}"
    elif status == 409:
        text = f"Cannot {doing}: it exists already (409: {said}). Use another name, or try again."
    elif status == 429:
        text = f"Cannot {doing}: {place} is busy (429). Wait a minute and try again."
    elif status in (400, 422):
        text = f"Cannot {doing}: {place} refuses the request ({status}: {said}). Check its values."
    elif status >= 500:
        text = (
            f"Cannot {doing}: {place} failed ({status}: {said}). Try again; look at {server.logs}."
        )
    else:
        text = f"Cannot {doing}: {place} answered {status} ({said}). {server.found}"
    return ClusterError(text, status=status)


def _is_api(body: tp.Any) -> bool:
    """Whether an error comes from KFP (a gRPC status) or Kubernetes, and not from a proxy."""
    try:
        parsed = json.loads(body)
    except (ValueError, TypeError):
        return False
    return isinstance(parsed, dict) and ("code" in parsed or parsed.get("kind") == "Status")


def message_of(body: tp.Any) -> str:
    """The message in an error's body, on one line; "" if there is none for people."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    try:
        parsed = json.loads(text)
    except ValueError:
        return "" if text.lstrip()[:1] == "<" else _short(text)
    if not isinstance(parsed, dict):
        return _short(text)
    for key in ("message", "error_message", "error", "error_details"):
        if isinstance(parsed.get(key), str) and parsed[key]:
            return _short(parsed[key])
    return _short(text)


def _reason(cause: BaseException) -> str:
    """The operating system's message, without the names of the library's objects."""
    text = str(cause)
    if found := re.search(r"Failed to resolve '([^']+)'", text):
        return f"no host {found[1]}"
    if found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", text):
        return found[1].strip().lower()
    return _short(text.rsplit(": ", 1)[-1])


def _short(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
