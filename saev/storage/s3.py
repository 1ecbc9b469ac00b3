"""Ranges of S3 objects through obstore: requests in Rust, outside Python's lock.

s3fs stays the one place where a user says how a store is reached: environment, AWS config files and
profiles, roles of pods, fsspec's own configuration. What it came to (endpoint, region, addressing,
credentials as they are renewed, certificates) is handed on. Where it came to something that obstore
does not have, s3fs reads.
"""

import datetime
import os
import threading
import typing as tp
import urllib.parse
from pathlib import Path

import fsspec

from saev.errors import CorruptDataError, StorageError
from saev.storage.sources import FsspecObject, entity_tag

if tp.TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

_PIECE = 64 << 10
"""Bytes that are passed on at once: what arrives is copied while it is still in the cache."""
_CREDENTIALS_LIVE = datetime.timedelta(minutes=10)
"""botocore renews what has less left than this, and obstore asks again when half of it is over."""
_RETRY: tp.Any = {
    "max_retries": 8,
    "retry_timeout": datetime.timedelta(minutes=3),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=10),
        "base": 2,
    },
}
_TIMEOUTS: tp.Any = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "30min"}


class _Process:
    """obstore's threads do not exist in a forked process, where a request would wait for ever."""

    lock = threading.Lock()
    started = False
    lost = False

    @classmethod
    def after_fork(cls) -> None:
        cls.lock = threading.Lock()
        cls.lost = cls.started


os.register_at_fork(after_in_child=_Process.after_fork)


def store_of(fs: fsspec.AbstractFileSystem, key: str) -> "S3Store | None":
    """The obstore of an object's bucket; None where fsspec has to read."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "s3" not in protocols or _Process.lost:
        return None
    try:
        from obstore.exceptions import BaseError
    except ImportError:
        return None
    bucket, path, version = fs.split_path(key)
    if version is not None or "//" in path or {".", ".."} & set(path.split("/")):
        return None  # keys that obstore does not take
    with _Process.lock:
        # On the instance, because another one with the same arguments may have begun in another
        # environment, and the two compare equal.
        stores = fs.__dict__.setdefault("_saev_stores", {})
        if bucket not in stores:
            try:
                stores[bucket] = _new_store(fs, bucket)
            except BaseError as err:
                raise StorageError(f"Cannot read s3://{key}: {_first_lines(err)}") from err
            _Process.started = _Process.started or stores[bucket] is not None
    return tp.cast("S3Store | None", stores[bucket])


def _new_store(fs: tp.Any, bucket: str) -> "S3Store | None":
    from botocore import UNSIGNED
    from obstore.store import S3Store

    client = fs.connect()
    meta = client.meta
    if not _has_all(fs, meta.config, bucket):
        return None
    anonymous = meta.config.signature_version is UNSIGNED
    provider = None if anonymous else _credentials(fs)
    if not anonymous and provider is None:
        return None  # s3fs says so best
    endpoint = urllib.parse.urlsplit(meta.endpoint_url)
    on_aws = (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    region = meta.region_name or "us-east-1"
    if on_aws:
        region = _region_of(fs, bucket) or region
    style = (meta.config.s3 or {}).get("addressing_style")
    in_host = style == "virtual" or (on_aws and style != "path" and "." not in bucket)
    base = meta.endpoint_url.rstrip("/")
    if on_aws and region != meta.region_name:
        base = f"{endpoint.scheme}://s3.{region}.{_suffix(endpoint.hostname or '')}"
    if in_host:
        base = base.replace("://", f"://{bucket}.", 1)
    config: tp.Any = {
        "endpoint": base,
        "aws_endpoint_url_s3": base,  # as this is set, that of the environment is not looked at
        "region": region,
        "virtual_hosted_style_request": in_host,
        "skip_signature": anonymous,
        "request_payer": fs.req_kw.get("RequestPayer") == "requester",
    }
    options: tp.Any = {"allow_http": endpoint.scheme == "http", **_TIMEOUTS}
    if endpoint.scheme == "https":
        options |= _certificates(fs)
    return S3Store(
        bucket,
        config=config,
        client_options=options,
        retry_config=_RETRY,
        credential_provider=provider,
    )


def _has_all(fs: tp.Any, config: tp.Any, bucket: str) -> bool:
    """Whether obstore has everything that this file system was told to do."""
    s3 = config.s3 or {}
    told = (
        fs.version_aware,
        fs.cache_regions,
        bucket.startswith("arn:") or bucket.endswith("--x-s3"),  # access points, directory buckets
        s3.get("use_accelerate_endpoint"),
        s3.get("use_dualstack_endpoint") or getattr(config, "use_dualstack_endpoint", None),
        getattr(config, "use_fips_endpoint", None),
        config.proxies,  # those of the environment reach obstore too
        config.client_cert,
        config.signature_version in ("s3", "s3-query"),
        any(option.startswith("SSECustomer") for option in {**fs.s3_additional_kwargs}),
        set(fs.req_kw) - {"RequestPayer"},
    )
    return not any(told)


class _Credentials:
    """What botocore found, wherever it did, and as it renews it."""

    def __init__(self, fs: tp.Any, found: tp.Any):
        self._fs, self._found = fs, found

    def __call__(self) -> "S3Credential":
        now = datetime.datetime.now(datetime.UTC)
        frozen = fsspec.asyn.sync(self._fs.loop, self._found.get_frozen_credentials)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": now + _CREDENTIALS_LIVE,
        }


def _credentials(fs: tp.Any) -> "tp.Callable[[], S3Credential] | None":
    given = {
        "access_key_id": fs.key or fs.client_kwargs.get("aws_access_key_id"),
        "secret_access_key": fs.secret or fs.client_kwargs.get("aws_secret_access_key"),
        "token": fs.token or fs.client_kwargs.get("aws_session_token"),
        "expires_at": None,
    }
    if given["access_key_id"] and given["secret_access_key"]:
        return lambda: tp.cast("S3Credential", given)
    found = fsspec.asyn.sync(fs.loop, fs.session.get_credentials)
    return None if found is None else _Credentials(fs, found)


def _region_of(fs: tp.Any, bucket: str) -> str | None:
    """Where AWS keeps a bucket. boto follows a redirection to there, obstore does not."""
    try:
        answer = fs.call_s3("head_bucket", Bucket=bucket)
    except Exception:  # nobody has to be allowed to ask; reading will say what is wrong
        return None
    return tp.cast(
        "str | None", answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    )


def _suffix(host: str) -> str:
    return "amazonaws.com.cn" if host.endswith(".cn") else "amazonaws.com"


def _certificates(fs: tp.Any) -> dict[str, tp.Any]:
    from botocore.httpsession import get_cert_path

    verify = fs.client_kwargs.get("verify")
    if verify is None:
        verify = fs.session.get_config_variable("ca_bundle")
    if verify is False:
        return {"allow_invalid_certificates": True}
    # Also what botocore brings along: an image need not have certificates of its own.
    bundle = Path(get_cert_path(True if verify is None else verify))
    return {"root_certificate": bundle.read_bytes()}


class S3Object(FsspecObject):
    """An object in a bucket that obstore reads."""

    def __init__(
        self, url: str, fs: tp.Any, key: str, size: int | None, etag: str, store: "S3Store"
    ):
        super().__init__(url, fs, key, size, etag)
        self._store = store
        self._path = fs.split_path(key)[1]

    def readinto(self, offset: int, view: memoryview) -> None:
        if _Process.lost:
            super().readinto(offset, view)
            return
        import obstore
        from obstore.exceptions import BaseError

        done = 0
        try:
            answer = obstore.get(
                self._store, self._path, options={"range": (offset, offset + view.nbytes)}
            )
            found = entity_tag({"ETag": answer.meta["e_tag"]})
            if self.etag and found and found != self.etag:
                raise CorruptDataError(
                    f"{self.url} was replaced while it was read: its ETag is {found}, it was "
                    f"{self.etag}. Run the same command again."
                )
            for piece in answer.stream(min_chunk_size=_PIECE):
                view[done : done + len(piece)] = piece
                done += len(piece)
        except (BaseError, FileNotFoundError) as err:
            raise _explain(err, self.url) from err
        if done != view.nbytes:
            raise CorruptDataError(
                f"{self.url}: {view.nbytes} bytes at {offset} were asked for, got {done}."
            )


def _explain(err: Exception, url: str) -> StorageError:
    """One sentence for obstore's answer, which has the store's XML and much else in it."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text = _first_lines(err)
    code = text.partition("<Code>")[2].partition("</Code>")[0]
    said = f" ({code})" if code else ""
    if isinstance(err, FileNotFoundError):
        named = "" if code == "NoSuchKey" else said
        return StorageError(f"Cannot read {url}: it does not exist{named}. Check the path.")
    if isinstance(err, PermissionDeniedError | UnauthenticatedError):
        return StorageError(
            f"Cannot read {url}: permission denied{said}. Check its owner or credentials."
        )
    if code == "InvalidRange":
        return CorruptDataError(f"{url} is shorter than it was. Run the same command again.")
    return StorageError(f"Cannot read {url}: {text}")


def _first_lines(err: Exception) -> str:
    return str(err).split("\n\nDebug source")[0]
