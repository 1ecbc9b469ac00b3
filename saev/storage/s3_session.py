"""The HTTP session of s3fs, with a limit on how long no byte of a request may move.

The limit of aiohttp (`sock_read`, botocore's `read_timeout`) starts when the body of the request
has been sent. Before that, aiohttp waits without any limit in two cases: for the answer to
`Expect: 100-continue`, and for a store that stops receiving the body.
"""

import asyncio
import contextvars
import typing as tp
import urllib.parse

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError

from saev.storage import waiting
from saev.storage.endpoints import check_endpoint


class Session(AIOHTTPSession):
    """The session of aiobotocore, with a time limit for every request."""

    def __init__(self, *args: tp.Any, timeout: tp.Any = None, **kwargs: tp.Any):
        super().__init__(*args, timeout=timeout, **kwargs)
        self._silent_s = float(timeout[1] if isinstance(timeout, list | tuple) else timeout)

    async def send(self, request: tp.Any) -> tp.Any:
        """Send a request.

        Raises:
            StorageError: the endpoint contains a password.
            TimeoutError: no byte moved for too long. botocore does not repeat the request; that is
                the task of :func:`saev.storage.faults.retry`.
        """
        check_endpoint(request.url)
        place = urllib.parse.urlsplit(request.url)
        limit_s = waiting.limit_s(self._silent_s)
        with waiting.waiting(f"{place.scheme}://{place.netloc}") as wait:
            try:
                async with asyncio.timeout(None) as timeout:
                    _current.set(_Limit(wait, timeout, limit_s))
                    return await super().send(request)
            except (TimeoutError, ReadTimeoutError, ConnectTimeoutError) as err:
                raise waiting.silent(limit_s) from err

    async def _get_session(self, proxy_url: tp.Any) -> tp.Any:
        session = await super()._get_session(proxy_url)
        if _TRACE not in session.trace_configs:
            session.trace_configs.append(_TRACE)
        return session


class _Limit(tp.NamedTuple):
    """The time limit of one request."""

    wait: waiting.Wait
    timeout: asyncio.Timeout
    limit_s: float

    def restart(self) -> None:
        """Start the limit anew: a byte moved, or waiting for the store begins."""
        self.wait.moved()
        self.timeout.reschedule(asyncio.get_running_loop().time() + self.limit_s)

    def pause(self) -> None:
        """Suspend the limit while this process does not wait for the store."""
        self.wait.pause()
        self.timeout.reschedule(None)


_current: contextvars.ContextVar[_Limit] = contextvars.ContextVar("limit")
"""The limit of the task's request. aiohttp's task that sends the body has the same context."""


async def _restart(*_: object) -> None:
    _current.get().restart()


async def _pause(*_: object) -> None:
    _current.get().pause()


def _trace() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_restart)
    trace.on_connection_queued_start.append(_pause)  # all connections are in use
    trace.on_connection_queued_end.append(_restart)
    trace.on_request_chunk_sent.append(_restart)
    trace.on_request_end.append(_pause)  # the headers have arrived; sock_read limits the body
    trace.freeze()
    return trace


_TRACE = _trace()
