"""The HTTP session of s3fs, with a limit for how long a request may be silent.

aiohttp's own limit (`sock_read`, botocore's `read_timeout`) begins when a request's body was sent.
Before, botocore asks whether it may send the body (`Expect: 100-continue`). aiohttp waits without
any limit for the answer to that, and for a store that stops to take the body.
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
    """As aiobotocore's, but each request of it ends."""

    def __init__(self, *args: tp.Any, timeout: tp.Any = None, **kwargs: tp.Any):
        super().__init__(*args, timeout=timeout, **kwargs)
        self._silent_s = float(timeout[1] if isinstance(timeout, list | tuple) else timeout)

    async def send(self, request: tp.Any) -> tp.Any:
        """Send a request.

        Raises:
            StorageError: the endpoint has a key in it.
            TimeoutError: no byte moved for too long. botocore does not try it again, as
                :func:`saev.storage.faults.retry` does.
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
    """What ends one request."""

    wait: waiting.Wait
    timeout: asyncio.Timeout
    limit_s: float

    def again(self) -> None:
        """The store is waited for, from now on."""
        self.wait.moved()
        self.timeout.reschedule(asyncio.get_running_loop().time() + self.limit_s)

    def pause(self) -> None:
        """The store is not waited for."""
        self.wait.pause()
        self.timeout.reschedule(None)


_current: contextvars.ContextVar[_Limit] = contextvars.ContextVar("limit")
"""Of the task's request. A task that aiohttp makes for the body has its context."""


async def _again(*_: object) -> None:
    _current.get().again()


async def _pause(*_: object) -> None:
    _current.get().pause()


def _trace() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_again)
    trace.on_connection_queued_start.append(_pause)  # all connections are busy with other requests
    trace.on_connection_queued_end.append(_again)
    trace.on_request_chunk_sent.append(_again)
    trace.on_request_end.append(_pause)  # the answer's head is there; sock_read limits the rest
    trace.freeze()
    return trace


_TRACE = _trace()
