"""Ranges of S3 objects: who reads them, with which endpoint and credentials, and what can fail."""

import itertools
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import certificates
import pytest
import s3_proxy
import s3fs

from saev import storage
from saev.errors import CorruptDataError, StorageError
from saev.storage.s3 import bucket_of
from saev.storage.urls import filesystem

MB = 1 << 20
DATA = bytes(range(256)) * 20_000


@pytest.fixture
def url(s3: str) -> str:
    """An object that holds DATA."""
    place = f"{s3}/{uuid.uuid4().hex}/x.bin"
    storage.write_bytes(place, DATA)
    return place


@pytest.fixture
def endpoint(s3: str) -> str:
    """Of the server."""
    return os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def proxy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:
    """Before the server; new file systems of this process go through it."""
    with s3_proxy.before(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # instances keep the endpoint that they began with
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def no_s3fs(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """s3fs reads no ranges."""

    def refuse(*args: object, **kwargs: object) -> bytes:
        raise AssertionError("s3fs was asked for a range")

    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", refuse)
    s3fs.S3FileSystem.clear_instance_cache()  # instances have a method of their own
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def by_s3fs(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The ranges that s3fs reads."""
    asked: list[object] = []
    cat_file = s3fs.S3FileSystem._cat_file

    async def recorded(self: s3fs.S3FileSystem, *args: object, **kwargs: object) -> bytes:
        asked.append(args)
        return await cat_file(self, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", recorded)
    s3fs.S3FileSystem.clear_instance_cache()  # instances have a method of their own
    yield asked
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of AWS in the environment, nor in the home folder."""
    for key in list(os.environ):
        if key.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def check(url: str) -> None:
    with storage.RangeReader(url) as reader:
        assert reader.read(1000, 70_000) == DATA[1000:71_000]
        assert reader.read(len(DATA) - 3, 3) == DATA[-3:]


# --- What it reads -------------------------------------------------------------------------


def test_ranges_do_not_go_through_s3fs(url: str, no_s3fs: None) -> None:
    with storage.RangeReader(url) as reader, ThreadPoolExecutor(8) as pool:
        starts = range(0, 5_000_000, 400_000)
        parts = list(pool.map(lambda start: reader.read(start, 100_000), starts))
    assert parts == [DATA[start : start + 100_000] for start in starts]


@pytest.mark.parametrize("key", ["a b+c%20.bin", "ü*?#[]{}~&=.bin", "a//b.bin", "a/./b.bin"])
def test_any_key(s3: str, key: str) -> None:
    client = botocore.session.get_session().create_client("s3")
    folder = uuid.uuid4().hex
    client.put_object(Bucket=s3[len("s3://") :], Key=f"{folder}/{key}", Body=DATA)
    check(f"{s3}/{folder}/{key}")


def test_a_known_size_saves_the_request(url: str, proxy: s3_proxy.Proxy) -> None:
    (entry,) = storage.list_dir(storage.parent(url))
    assert entry.etag
    proxy.requests.clear()
    with storage.RangeReader(url, size=entry.size, etag=entry.etag) as reader:
        assert reader.read(5, 10) == DATA[5:15]
    assert [r.method for r in proxy.requests] == ["GET"]


FORKED = """
import os, sys
from saev import storage
url = sys.argv[1]
with storage.RangeReader(url) as reader:
    reader.read(0, 10)
    child = os.fork()
    if not child:
        import s3fs
        s3fs.S3FileSystem.clear_instance_cache()
        with storage.RangeReader(url) as mine:
            os._exit(mine.read(1, 3) != b"\\1\\2\\3")
    print(os.waitpid(child, 0)[1], reader.read(1, 3))
"""


def test_a_forked_process_reads_too(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, url], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == r"0 b'\x01\x02\x03'", done.stderr


# --- Endpoint and credentials --------------------------------------------------------------


def through(proxy: s3_proxy.Proxy, url: str, access_key: str) -> None:
    """Read, and see that it went through the proxy with this key."""
    s3fs.S3FileSystem.clear_instance_cache()
    check(url)
    found = {request.access_key for request in proxy.gets("/x.bin")}
    assert found == {access_key}


@pytest.mark.usefixtures("no_s3fs")
class TestSettings:
    def test_environment(self, url, proxy, clean, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "environment")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        through(proxy, url, "environment")
        assert {r.headers["x-amz-security-token"] for r in proxy.gets("/x.bin")} == {"token"}

    def test_profile_in_files(self, url, proxy, clean, monkeypatch, tmp_path):
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws" / "config").write_text(
            "[profile lab]\nregion = eu-north-1\nservices = mine\n"
            f"[services mine]\ns3 =\n  endpoint_url = {proxy.url}\n  addressing_style = path\n"
        )
        (tmp_path / ".aws" / "credentials").write_text(
            "[lab]\naws_access_key_id = profile\naws_secret_access_key = x\n"
        )
        monkeypatch.setenv("AWS_PROFILE", "lab")
        through(proxy, url, "profile")
        assert all("/eu-north-1/" in r.headers["authorization"] for r in proxy.gets("/x.bin"))

    def test_fsspec_environment(self, url, proxy, clean, monkeypatch):
        import fsspec.config

        settings = {
            "FSSPEC_S3_ENDPOINT_URL": proxy.url,
            "FSSPEC_S3_KEY": "fsspec",
            "FSSPEC_S3_SECRET": "x",
        }
        monkeypatch.setitem(fsspec.config.conf, "s3", {})
        fsspec.config.set_conf_env(fsspec.config.conf, settings)  # as when it is imported
        through(proxy, url, "fsspec")

    def test_anonymous(self, url, proxy, clean, monkeypatch, s3):
        import fsspec.config

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=proxy.url,
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )
        client.put_object_acl(
            Bucket=s3[len("s3://") :], Key=url.split("/", 3)[3], ACL="public-read"
        )
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
        through(proxy, url, "")

    def test_credentials_that_are_renewed(self, url, proxy, clean, monkeypatch, tmp_path):
        """From a process, which hands out another key each time, one that is nearly over."""
        script = tmp_path / "keys.py"
        script.write_text(
            "import datetime, json, pathlib\n"
            f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
            "n = int(count.read_text()) + 1 if count.exists() else 1\n"
            "count.write_text(str(n))\n"
            "soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=10)\n"
            "print(json.dumps(dict(Version=1, AccessKeyId=f'renewed{n}', SecretAccessKey='x',\n"
            "    SessionToken='x', Expiration=soon.isoformat())))\n"
        )
        (tmp_path / "config").write_text(
            f"[default]\ncredential_process = {sys.executable} {script}\nregion = us-east-1\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        check(url)
        keys = {request.access_key for request in proxy.gets("/x.bin")}
        assert keys
        assert all(key.startswith("renewed") for key in keys)

    def test_the_role_of_a_pod(self, url, proxy, clean, monkeypatch, tmp_path):
        (tmp_path / "token").write_text("a.web.token")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/saev")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        check(url)
        assert any(r.method == "POST" for r in proxy.requests)  # AssumeRoleWithWebIdentity
        (key,) = {request.access_key for request in proxy.gets("/x.bin")}
        assert key.startswith("ASIA")


def test_what_is_not_known_here_s3fs_does(url, by_s3fs, monkeypatch) -> None:
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "s3", {"version_aware": True})
    check(url)
    assert len(by_s3fs) == 2


@pytest.mark.parametrize(("style", "host"), [("path", ""), ("auto", ""), ("virtual", "{}.")])
def test_where_the_bucket_stands(url, proxy, clean, monkeypatch, tmp_path, style, host) -> None:
    (tmp_path / "config").write_text(
        "[default]\naws_access_key_id = x\naws_secret_access_key = x\n"
        f"region = us-east-1\ns3 =\n  addressing_style = {style}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
    s3fs.S3FileSystem.clear_instance_cache()
    name, _, key = url.removeprefix("s3://").partition("/")
    found = bucket_of(*filesystem(url))
    assert found is not None
    assert found._base.netloc == host.format(name) + "store.example:9000"
    assert found.target(key) == (f"/{key}" if host else f"/{name}/{key}")


def test_certificates_of_our_own(url, endpoint, clean, monkeypatch, no_s3fs, tmp_path) -> None:
    """https with a bundle that AWS_CA_BUNDLE names, and without it."""
    context = certificates.for_loopback("saev test").server(tmp_path)
    with s3_proxy.before(endpoint, context) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tls")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        with (
            storage.RangeReader(url, size=len(DATA)) as reader,
            pytest.raises(StorageError, match=r"x\.bin: the certificate .*AWS_CA_BUNDLE"),
        ):
            reader.read(0, 5)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        through(proxy, url, "tls")


def test_one_connection_a_thread(url, proxy, no_s3fs) -> None:
    ports = set()
    proxy.fault = lambda request: ports.add(request.port) if request.method == "GET" else ""
    with storage.RangeReader(url) as reader:
        for start in range(0, 4 * MB, MB // 4):
            assert reader.read(start, MB // 4) == DATA[start : start + MB // 4]
    assert len(ports) == 1


def test_an_idle_connection_that_was_closed_is_opened_anew(url, proxy, no_s3fs) -> None:
    with storage.RangeReader(url) as reader:
        reader.read(0, 5)
        bucket = bucket_of(*filesystem(url))
        bucket._local.connection[1].sock.shutdown(socket.SHUT_RDWR)  # as a server's time-out does
        start = time.monotonic()
        assert reader.read(5, 5) == DATA[5:10]
        assert time.monotonic() - start < 5


# --- Faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "cut", "503"])
def test_transient_faults_are_tried_again(url, proxy, no_s3fs, fault) -> None:
    turn = itertools.count()

    def every_second(request: s3_proxy.Request) -> str:
        return fault if request.path.endswith("x.bin") and next(turn) % 2 else ""

    proxy.fault = every_second
    with storage.RangeReader(url) as reader:
        for start in range(0, 4 * MB, MB):
            assert reader.read(start, MB) == DATA[start : start + MB]
    assert len(proxy.gets("/x.bin")) > 5


def test_a_replaced_object_is_an_error(url: str) -> None:
    (entry,) = storage.list_dir(storage.parent(url))
    with (
        storage.RangeReader(url) as looked,
        storage.RangeReader(url, size=entry.size, etag=entry.etag) as listed,
    ):
        assert looked.read(0, 5) == listed.read(0, 5)
        storage.write_bytes(url, DATA[::-1])
        for reader in (looked, listed):
            with pytest.raises(CorruptDataError, match=r"x\.bin was replaced while it was read"):
                reader.read(0, 5)
        storage.write_bytes(url, b"short")
        with pytest.raises(CorruptDataError, match=r"x\.bin (was replaced|is shorter)"):
            looked.read(1000, 5)


def test_missing_objects_and_buckets_are_named(s3: str) -> None:
    with (
        storage.RangeReader(f"{s3}/no/such.bin", size=10) as reader,
        pytest.raises(StorageError, match=r"no/such\.bin: it does not exist\. Check the path"),
    ):
        reader.read(0, 5)
    with (
        storage.RangeReader("s3://no-such-bucket/x", size=10) as reader,
        pytest.raises(StorageError, match=r"no bucket no-such-bucket at http.*NoSuchBucket"),
    ):
        reader.read(0, 5)


def test_forbidden_is_named(url: str, proxy: s3_proxy.Proxy, monkeypatch) -> None:
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    with (
        storage.RangeReader(url, size=len(DATA)) as reader,
        pytest.raises(
            StorageError, match=r"x\.bin: permission denied .*lacks the permission s3:GetObj"
        ),
    ):
        reader.read(0, 5)


def test_no_credentials_is_named(url: str, proxy: s3_proxy.Proxy, clean, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    with (
        pytest.raises(StorageError, match=r"x\.bin: .*[Cc]redentials"),
        storage.RangeReader(url, size=len(DATA)) as reader,
    ):
        reader.read(0, 5)


def test_a_server_that_is_gone_is_one_sentence(url: str, proxy, monkeypatch) -> None:
    monkeypatch.setenv("SAEV_PATIENCE_S", "2")
    with storage.RangeReader(url) as reader:
        proxy.fault = lambda request: "503"
        with pytest.raises(StorageError, match=r"Cannot read .*x\.bin: .*503") as caught:
            reader.read(0, 5)
    assert "\n" not in str(caught.value)
    assert "Signature" not in str(caught.value)
