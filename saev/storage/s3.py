"""Ranges of S3 objects, read over one HTTP connection per thread directly into the caller's memory.

The user configures the store for s3fs: by environment variables, AWS config files and profiles,
roles of pods, or fsspec's configuration. This module uses the settings that s3fs resolved
(endpoint, region, addressing, credentials, certificates), and botocore signs the requests. Each
thread reads from its own socket into the target buffer.

For the same read, s3fs needs an extra thread and two copies, and obstore two copies and a switch
between threads per packet (benchmarks/loader_s3.py compares them). With settings that this module
does not support, s3fs reads.
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
"""Seconds for which a signature is reused. Stores accept it for 15 minutes, and botocore renews
credentials 10 minutes before they expire. One signature fits all ranges of an object, because the
Range header is not signed."""
_MOST_BODY = 64 << 10
"""Most bytes to read of the body of a refusal."""
_PIECE = 256 << 10
"""Bytes per read from the socket. Small reads show that a slow store still sends."""
_FRESH_S = 1.0
"""If the store calls a signature expired that is younger than this, a new one would not help."""


class Bucket:
    """Sends requests to one bucket."""

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
        """Path of an object's URL."""
        return f"{self._base.path}/{urllib.parse.quote(key, safe='/~')}"

    def target_of_listing(self, query: dict[str, str]) -> str:
        """Path and query of a listing's URL."""
        words = urllib.parse.urlencode(query, quote_via=urllib.parse.quote, safe="-_.~")
        return f"{self._base.path or '/'}?{words}"

    def sign(self, target: str) -> dict[str, str]:
        """Headers of a GET request, signed unless the bucket is read anonymously."""
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
        """Send a GET. The connection is reused if the body is read to its end."""
        limit_s = waiting.limit_s(self._silent_s)
        # A forked process must not use its parent's connections.
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
                    except (http.client.HTTPException, OSError):  # the store closed it when idle
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
        """Content length; None if the store did not send it."""

    def read(self, most: float = math.inf) -> bytes:
        """The first ``most`` bytes of the body."""
        parts: list[bytes] = []
        while most > 0 and (part := self._response.read1(int(min(most, _PIECE)))):
            parts.append(part)
            most -= len(part)
            self._wait.moved()
        if most > 0:
            self._response.read()  # raises IncompleteRead if the body is too short
        return b"".join(parts)

    def readinto(self, view: memoryview) -> None:
        """Fill ``view``. Raises ConnectionError if the body is shorter."""
        done = 0
        while done < view.nbytes:
            n = self._response.readinto(view[done : done + _PIECE])
            if not n:
                raise ConnectionError(f"the answer ended after {done} of {view.nbytes} bytes")
            done += n
            self._wait.moved()
        self._response.read()  # returns nothing, and frees the connection


class S3Object(FsspecObject):
    """An object that is read without s3fs."""

    def __init__(self, url: str, fs: tp.Any, key: str, size: int | None, etag: str, bucket: Bucket):
        super().__init__(url, fs, key, size, etag)
        self._bucket = bucket
        self._target = bucket.target(fs.split_path(key)[1])
        self._signature: tuple[float, dict[str, str]] = (0.0, {})

    def readinto(self, offset: int, view: memoryview) -> None:
        if not self._get(offset, view, {}):
            super().readinto(offset, view)

    def reread(self, offset: int, view: memoryview) -> None:
        if not self._get(offset, view, {"Cache-Control": "no-cache"}):  # for caching proxies
            super().reread(offset, view)

    @retry
    def _get(self, offset: int, view: memoryview, headers: dict[str, str]) -> bool:
        """Fill ``view``; False if the store redirects to another region, which s3fs can follow."""
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
            raise ConnectionError(str(answer))  # the next attempt makes a new signature
        if answer.is_elsewhere:
            return False
        if answer.status == 416:
            raise CorruptDataError(
                f"{self.url} is shorter than it was. Run the same command again."
            )
        if answer.status == 200:
            raise StorageError(f"Cannot read {self.url}: its store ignores ranges of bytes.")
        raise answers.RefusedError(answer)


# --- Settings resolved by s3fs -------------------------------------------------------------


def bucket_of(fs: fsspec.AbstractFileSystem, key: str) -> Bucket | None:
    """The bucket of an object; None if only fsspec can read it."""
    if not is_s3(fs):
        return None
    name, _, version = tp.cast(tp.Any, fs).split_path(key)
    if version is not None:
        return None
    # Kept on the instance: file systems made in different environments compare equal. Two threads
    # may both make a bucket; then one of them is used.
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
        return None  # s3fs raises a clear error
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
    """Whether this module supports all settings of the file system."""
    s3 = config.s3 or {}
    unsupported = (
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
    return not any(unsupported)


def _has_proxy(scheme: str, host: str) -> bool:
    return scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)


def _credentials(fs: tp.Any) -> tp.Any:
    """Botocore's current credentials, renewed if necessary; None if it found none."""
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
    """Region of a bucket on AWS; None if it is not known. Reading then raises a clear error."""
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
    # By default the certificates that come with botocore, because an image may have none.
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
