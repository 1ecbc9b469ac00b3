"""Ranges of S3 objects over HTTP connections of the reading threads, straight into their memory.

s3fs stays the one place where a user says how a store is reached: environment, AWS config files and
profiles, roles of pods, fsspec's own configuration. What it came to (endpoint, region, addressing,
credentials as they are renewed, certificates) is used here, botocore signs, and each thread reads
from a socket of its own into the place where the bytes are wanted. s3fs takes a thread of Python
and two copies for that, and obstore a hand-over between threads per packet and two copies
(benchmarks/loader_s3.py compares). Where s3fs came to something that is not known here, it reads.
"""

import contextlib
import functools
import http.client
import math
import os
import socket
import ssl
import threading
import time
import typing as tp
import urllib.parse
import urllib.request
from pathlib import Path

import fsspec

from saev.errors import CorruptDataError, StorageError
from saev.storage import answers, waiting
from saev.storage.endpoints import check_endpoint
from saev.storage.faults import retry
from saev.storage.sources import FsspecObject, entity_tag
from saev.storage.urls import is_s3

_SIGNATURE_LIVES_S = 240.0
"""Stores take a signature for 15 minutes, and botocore renews credentials 10 minutes before their
end, so one serves all ranges of an object for some minutes. A range itself need not be signed."""
_MOST_BODY = 64 << 10
"""Bytes of a refusal that are read."""
_PIECE = 256 << 10
"""Bytes that are read at a time, so that a slow answer is not taken for a silent one."""
_FRESH_S = 1.0
"""A signature younger than this is not made again if the store says that it has expired."""


class Bucket:
    """How the objects of a bucket are asked for."""

    def __init__(self, fs: tp.Any, base: str, region: str, headers: dict[str, str], signed: bool):
        self._fs = fs
        self._base = urllib.parse.urlsplit(base)
        self._region = region
        self._headers = headers
        self._signed = signed
        self._local = threading.local()
        self._silent_s: float = fs.s3.meta.config.read_timeout
        self._context = _certificates(fs) if self._base.scheme == "https" else None

    def target(self, key: str) -> str:
        """What follows the host in an object's URL."""
        return f"{self._base.path}/{urllib.parse.quote(key, safe='/~')}"

    def target_of_listing(self, query: dict[str, str]) -> str:
        """What follows the host in the URL of a request about the bucket."""
        words = urllib.parse.urlencode(query, quote_via=urllib.parse.quote, safe="-_.~")
        return f"{self._base.path or '/'}?{words}"

    def sign(self, target: str) -> dict[str, str]:
        """Headers of a GET."""
        if not self._signed:
            return dict(self._headers)
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        url = f"{self._base.scheme}://{self._base.netloc}{target}"
        request = AWSRequest("GET", url, headers=self._headers)
        S3SigV4Auth(_credentials(self._fs), "s3", self._region).add_auth(request)
        return {name: str(value) for name, value in request.headers.items()}

    @contextlib.contextmanager
    def answer(self, target: str, headers: dict[str, str]) -> tp.Iterator["Answer"]:
        """The answer to a GET; its connection serves again if the answer was read to its end."""
        limit_s = waiting.limit_s(self._silent_s)
        # A forked process must not speak on its parent's connections.
        pid, connection = getattr(self._local, "connection", (0, None))
        if pid != os.getpid():
            connection = None
        self._local.connection = (0, None)
        with waiting.waiting(f"{self._base.scheme}://{self._base.netloc}") as wait:
            try:
                answer = None
                if connection is not None:
                    try:
                        answer = _ask(connection, target, headers, limit_s)
                    except TimeoutError:
                        raise
                    except (http.client.HTTPException, OSError):  # it was idle for too long
                        connection.close()
                if answer is None:
                    connection = self._new_connection(limit_s)
                    answer = _ask(connection, target, headers, limit_s)
                wait.moved()
                yield Answer(answer, wait)
                if answer.isclosed() and not answer.will_close:
                    self._local.connection = (os.getpid(), connection)
                    connection = None
            except TimeoutError as err:
                raise waiting.silent(limit_s) from err
            finally:
                if connection is not None:
                    connection.close()

    def _new_connection(self, timeout_s: float) -> http.client.HTTPConnection:
        netloc = self._base.netloc
        if self._context is None:
            return http.client.HTTPConnection(netloc, timeout=timeout_s)
        return http.client.HTTPSConnection(netloc, timeout=timeout_s, context=self._context)


def _ask(
    connection: http.client.HTTPConnection, target: str, headers: dict[str, str], limit_s: float
) -> http.client.HTTPResponse:
    if connection.sock is not None:
        connection.sock.settimeout(limit_s)
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


class Answer:
    """A store's answer to a GET."""

    def __init__(self, response: http.client.HTTPResponse, wait: waiting.Wait):
        self._response, self._wait = response, wait
        self.status = response.status
        self.headers = response.headers
        self.n_bytes = response.length
        """How much there is to read, if the store said so."""

    def read(self, most: float = math.inf) -> bytes:
        """The body, or its begin."""
        parts: list[bytes] = []
        while most > 0 and (part := self._response.read1(int(min(most, _PIECE)))):
            parts.append(part)
            most -= len(part)
            self._wait.moved()
        if most > 0:
            self._response.read()  # nothing, unless the body is shorter than it should be
        return b"".join(parts)

    def readinto(self, view: memoryview) -> None:
        """Fill ``view``. Raises ConnectionError if the body ends before."""
        done = 0
        while done < view.nbytes:
            n = self._response.readinto(view[done : done + _PIECE])
            if not n:
                raise ConnectionError(f"the answer ended after {done} of {view.nbytes} bytes")
            done += n
            self._wait.moved()
        self._response.read()  # nothing; the connection is free then


class S3Object(FsspecObject):
    """An object in a bucket that is read here."""

    def __init__(self, url: str, fs: tp.Any, key: str, size: int | None, etag: str, bucket: Bucket):
        super().__init__(url, fs, key, size, etag)
        self._bucket = bucket
        self._target = bucket.target(fs.split_path(key)[1])
        self._signature: tuple[float, dict[str, str]] = (0.0, {})

    def readinto(self, offset: int, view: memoryview) -> None:
        if not self._get(offset, view, {}):
            super().readinto(offset, view)

    def reread(self, offset: int, view: memoryview) -> None:
        if not self._get(offset, view, {"Cache-Control": "no-cache"}):  # for proxies on the way
            super().reread(offset, view)

    @retry
    def _get(self, offset: int, view: memoryview, headers: dict[str, str]) -> bool:
        """Fill ``view``; False if the store sends us elsewhere, which s3fs knows to follow."""
        wanted = {"Range": f"bytes={offset}-{offset + view.nbytes - 1}", **headers}
        try:
            with self._bucket.answer(self._target, self._headers() | wanted) as answer:
                whole = answer.status == 200 and not offset and view.nbytes == self.size
                if answer.status == 206 or whole:
                    self._check(answer, offset, view.nbytes)
                    answer.readinto(view)
                    return True
                body = answer.read(_MOST_BODY).decode(errors="replace")
                region = answer.headers.get("x-amz-bucket-region", "")
                refusal = answers.parse(answer.status, body, "GetObject", region)
        except (http.client.HTTPException, socket.gaierror) as err:
            raise ConnectionError(f"{type(err).__name__}: {err}") from err
        return self._refused(refusal)

    def _headers(self) -> dict[str, str]:
        signed_at, headers = self._signature
        if not headers or time.monotonic() - signed_at > _SIGNATURE_LIVES_S:
            headers = self._bucket.sign(self._target)
            self._signature = (time.monotonic(), headers)
        return headers

    def _check(self, answer: Answer, offset: int, n_bytes: int) -> None:
        found = entity_tag({"ETag": answer.headers.get("ETag")})
        if self.etag and found and found != self.etag:
            raise CorruptDataError(
                f"{self.url} was replaced while it was read: its ETag is {found}, it was "
                f"{self.etag}. Run the same command again."
            )
        if answer.n_bytes is not None and answer.n_bytes != n_bytes:
            raise CorruptDataError(
                f"{self.url}: {n_bytes} bytes at {offset} were asked for, got {answer.n_bytes}."
            )

    def _refused(self, answer: answers.Answer) -> bool:
        if answer.has_expired and time.monotonic() - self._signature[0] > _FRESH_S:
            self._signature = (0.0, {})
            raise ConnectionError(str(answer))  # signed anew at the next try
        if answer.is_elsewhere:
            return False
        if answer.status == 416:
            raise CorruptDataError(
                f"{self.url} is shorter than it was. Run the same command again."
            )
        if answer.status == 200:
            raise StorageError(f"Cannot read {self.url}: its store ignores ranges of bytes.")
        raise answers.RefusedError(answer)


# --- What s3fs came to ---------------------------------------------------------------------


def bucket_of(fs: fsspec.AbstractFileSystem, key: str) -> Bucket | None:
    """How an object's bucket is read here; None where fsspec has to read."""
    if not is_s3(fs):
        return None
    name, _, version = tp.cast(tp.Any, fs).split_path(key)
    if version is not None:
        return None
    # On the instance, because another one with the same arguments may have begun in another
    # environment, and the two compare equal. Of two threads, one makes it in vain.
    buckets = fs.__dict__.setdefault("_saev_buckets", {})
    if name not in buckets:
        buckets.setdefault(name, _new_bucket(fs, name))
    return tp.cast("Bucket | None", buckets[name])


def _new_bucket(fs: tp.Any, name: str) -> Bucket | None:
    from botocore import UNSIGNED

    meta = fs.connect().meta
    check_endpoint(meta.endpoint_url)
    endpoint = urllib.parse.urlsplit(meta.endpoint_url)
    host = endpoint.hostname or ""
    if not _is_known(fs, meta.config, name) or _has_proxy(endpoint.scheme, host):
        return None
    signed = meta.config.signature_version is not UNSIGNED
    if signed and _credentials(fs) is None:
        return None  # s3fs says so best
    base, region = meta.endpoint_url.rstrip("/"), meta.region_name or "us-east-1"
    on_aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if on_aws:
        found = _region_of(fs, name)
        if found and found != meta.region_name:
            region = found
            suffix = "amazonaws.com.cn" if host.endswith(".cn") else "amazonaws.com"
            base = f"{endpoint.scheme}://s3.{region}.{suffix}"
    style = (meta.config.s3 or {}).get("addressing_style")
    if style == "virtual" or (on_aws and style != "path" and "." not in name):
        base = base.replace("://", f"://{name}.", 1)
    else:
        base = f"{base}/{name}"
    payer = fs.req_kw.get("RequestPayer")
    return Bucket(fs, base, region, {"x-amz-request-payer": payer} if payer else {}, signed)


def _is_known(fs: tp.Any, config: tp.Any, bucket: str) -> bool:
    """Whether this module has everything that the file system was told to do."""
    s3 = config.s3 or {}
    told = (
        fs.version_aware,
        fs.cache_regions,
        bucket.startswith("arn:") or bucket.endswith("--x-s3"),  # access points, directory buckets
        s3.get("use_accelerate_endpoint"),
        s3.get("use_dualstack_endpoint") or getattr(config, "use_dualstack_endpoint", None),
        getattr(config, "use_fips_endpoint", None),
        config.proxies,
        config.client_cert,
        config.signature_version in ("s3", "s3-query"),
        any(option.startswith("SSECustomer") for option in fs.s3_additional_kwargs),
        set(fs.req_kw) - {"RequestPayer"},
    )
    return not any(told)


def _has_proxy(scheme: str, host: str) -> bool:
    return scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)


def _credentials(fs: tp.Any) -> tp.Any:
    """What botocore has, wherever it found it, renewed if need be; None if it found nothing."""
    from botocore.credentials import Credentials

    given = [
        fs.key or fs.client_kwargs.get("aws_access_key_id"),
        fs.secret or fs.client_kwargs.get("aws_secret_access_key"),
        fs.token or fs.client_kwargs.get("aws_session_token"),
    ]
    if given[0] and given[1]:
        return Credentials(*given)
    found = fsspec.asyn.sync(fs.loop, fs.session.get_credentials)
    if found is None:
        return None
    frozen = fsspec.asyn.sync(fs.loop, found.get_frozen_credentials)
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token)


def _region_of(fs: tp.Any, bucket: str) -> str | None:
    """Where AWS keeps a bucket, or None if we may not ask; then reading says what is wrong."""
    with contextlib.suppress(Exception):
        answer = fs.call_s3("head_bucket", Bucket=bucket)
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return tp.cast("str | None", headers.get("x-amz-bucket-region"))
    return None


def _certificates(fs: tp.Any) -> ssl.SSLContext:
    from botocore.httpsession import get_cert_path

    verify = fs.client_kwargs.get("verify")
    if verify is None:
        verify = fs.session.get_config_variable("ca_bundle")
    # As botocore does, with what it brings along: an image need not have certificates of its own.
    return _context("" if verify is False else str(get_cert_path(verify or True)))


@functools.cache
def _context(bundle: str) -> ssl.SSLContext:
    if not bundle:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)
