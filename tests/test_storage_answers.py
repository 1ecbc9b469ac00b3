"""What a user is told when an object store refuses: one sentence, at once, on every way to it."""

import logging
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import certificates
import pytest
import s3_proxy
import s3fs
from test_storage_s3 import clean, endpoint, proxy  # noqa: F401 - fixtures

from saev import storage
from saev.errors import StorageError
from saev.storage import waiting
from saev.storage.answers import Answer

WAYS: dict[str, Callable[[str], object]] = {
    "write": lambda url: storage.write_bytes(url, b"x"),
    "write much": lambda url: storage.write_bytes(url, bytes(33 << 20)),
    "read": storage.read_bytes,
    "range": lambda url: storage.RangeReader(url, size=10).read(0, 5),
    "size": storage.size,
    "exists": storage.exists,
    "list": lambda url: storage.list_dir(storage.parent(url)),
    "walk": lambda url: [*storage.walk(storage.parent(url))],
    "create": lambda url: storage.create(url, b"x"),
    "delete": storage.delete,
    "delete all": lambda url: storage.delete(storage.parent(url), recursive=True),
}
"""Through s3fs, but for "range", which has connections of our own."""

SKEWED = {"RequestTime": "20261127T073000Z", "ServerTime": "2026-11-27T06:00:00Z"}
ANSWERS = {
    "missing bucket": (
        s3_proxy.error(404, "NoSuchBucket", "The specified bucket does not exist"),
        r"no bucket saev-tests at http://127.*\(404 NoSuchBucket\)\. Create it",
    ),
    "expired": (
        s3_proxy.error(400, "ExpiredToken", "The provided token has expired."),
        r"credentials test have expired \(400 ExpiredToken\)\. Get new ones",
    ),
    "signature": (
        s3_proxy.error(
            403, "SignatureDoesNotMatch", "The request signature we …", AWSAccessKeyId="AKIDTEST"
        ),
        r"signature is wrong \(403 SignatureDoesNotMatch\).*AKIDTEST.*AWS_SECRET_ACCESS_KEY",
    ),
    "unknown key": (
        s3_proxy.error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided …"),
        r"does not know access key test \(403 InvalidAccessKeyId\)\. Check AWS_ACCESS_KEY_ID",
    ),
    "clock": (
        s3_proxy.error(403, "RequestTimeTooSkewed", "The difference between …", **SKEWED),
        r"clock differs from the store's by 5400 s: it is ahead \(403 RequestTimeTooSkewed\)",
    ),
    "region": (
        s3_proxy.error(
            400,
            "AuthorizationHeaderMalformed",
            "The region 'us-east-1' is wrong; expecting 'eu-west-3'",
            Region="eu-west-3",
        ),
        r"is in region eu-west-3, us-east-1 was asked .*Set AWS_DEFAULT_REGION=eu-west-3",
    ),
    "read-only": (
        s3_proxy.error(405, "MethodNotAllowed", "The specified method is not allowed"),
        r"does not allow this \(405 .*\); it may be read-only",
    ),
    "denied": (
        s3_proxy.error(403, "AccessDenied", "Access Denied"),
        r"permission denied \(403 AccessDenied\): access key test lacks the permission "
        r"s3:(GetObject|PutObject|DeleteObject|ListBucket) on arn:aws:s3:::saev-tests.*Add it to",
    ),
    "denied by name": (
        s3_proxy.error(
            403,
            "AccessDenied",
            "User: arn:aws:iam::1:user/x is not authorized to perform: kms:GenerateDataKey on …",
        ),
        r"lacks the permission kms:GenerateDataKey on ",
    ),
}
PERMISSIONS = {
    "write": "PutObject", "write much": "PutObject", "create": "PutObject",
    "read": "GetObject", "range": "GetObject", "size": "GetObject", "exists": "GetObject",
    "list": "ListBucket", "walk": "ListBucket", "delete all": "DeleteObject",
    "delete": "DeleteObject",
}  # fmt: skip
NOTHING_THERE = ("exists", "delete", "delete all")
"""To these, a missing bucket is as an empty one."""


@pytest.fixture
def url(s3: str) -> str:
    return f"{s3}/{uuid.uuid4().hex}/x.bin"


def refused(way: str, url: str) -> str:
    """What is said."""
    with pytest.raises(StorageError) as caught:
        WAYS[way](url)
    assert not isinstance(caught.value, storage.CorruptDataError)
    assert not storage.is_passing(caught.value)
    message = str(caught.value)
    assert message.startswith("Cannot ")
    assert storage.parent(url) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("what", ANSWERS)
def test_every_refusal_is_one_sentence_at_once(url, proxy, what) -> None:  # noqa: F811
    answer, expected = ANSWERS[what]
    proxy.fault = lambda request: answer
    for way in WAYS:
        if what == "missing bucket" and way in NOTHING_THERE:
            continue
        proxy.requests.clear()
        message = refused(way, url)
        assert re.search(expected, message), f"{way}: {message}"
        if what == "denied":
            assert f"s3:{PERMISSIONS[way]} on" in message
        # Nothing waits: at most a redirected request, and one more that asks HEAD's reason.
        assert len(proxy.requests) <= 4, way


def test_keys_that_were_not_deleted_are_an_error(url, proxy) -> None:  # noqa: F811
    storage.write_bytes(url, b"x")
    body = (
        b"<DeleteResult><Error><Key>x.bin</Key><Code>AccessDenied</Code>"
        b"<Message>Access Denied</Message></Error></DeleteResult>"
    )
    refusal = s3_proxy.Reply(200, body, {"Content-Type": "application/xml"})
    proxy.fault = lambda request: refusal if request.method == "POST" else ""
    assert "lacks the permission s3:DeleteObject" in refused("delete all", url)
    assert storage.read_bytes(url) == b"x"


def test_deletes_are_tried_again_and_a_failed_clean_up_is_a_warning(
    url: str,
    proxy: s3_proxy.Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for fault in ("503", "reset", "lost"):
        storage.write_bytes(url, b"x")
        # As often as botocore tries; then we have to.
        left = [fault, fault, fault, fault]
        proxy.fault = lambda request, left=left: (
            left.pop() if left and request.method in ("DELETE", "POST") else ""
        )
        storage.delete(storage.parent(url), recursive=True)
        assert not left
        assert not storage.exists(url)
    monkeypatch.setenv("SAEV_PATIENCE_S", "0")
    proxy.fault = lambda request: "503"
    with caplog.at_level(logging.WARNING):
        storage.clean_up(url)
    assert "x.bin" in caplog.text
    assert "Nothing depends on it" in caplog.text


@pytest.mark.parametrize("way", ["range", "write"])
def test_a_store_that_is_down_is_told_while_it_is_waited_for(
    url: str,
    proxy: s3_proxy.Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    assert not storage.exists(url + ".none")  # starts the client, which takes long
    monkeypatch.setenv("SAEV_PATIENCE_S", "4")
    monkeypatch.setattr(waiting, "QUIET_S", 0.5)
    monkeypatch.setattr(waiting, "_warned", {})
    proxy.fault = lambda request: s3_proxy.error(503, "SlowDown", "Please reduce your rate.")
    with pytest.raises(StorageError, match=r"down or overloaded \(503") as caught:
        WAYS[way](url)
    assert storage.is_passing(caught.value)
    assert re.search(r"It was tried \d+ times in \d+ s\.$", str(caught.value))
    (line,) = [r.message for r in caplog.records if "It is tried again" in r.message]
    assert line.startswith(f"Cannot {'read' if way == 'range' else way} s3://")


@pytest.mark.parametrize("way", ["read", "range", "write"])
@pytest.mark.parametrize("kind", ["unknown CA", "plain port", "no host", "no server"])
def test_what_is_wrong_before_a_store_answers(
    url: str,
    endpoint: str,  # noqa: F811
    clean: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
    kind: str,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tls")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("SAEV_PATIENCE_S", "0.5")
    context = certificates.for_loopback("saev test").server(tmp_path)
    with s3_proxy.before(endpoint, context) as tls:
        place, expected = {
            "unknown CA": (tls.url, r"cannot be trusted \(self-signed .*set AWS_CA_BUNDLE to"),
            "plain port": (
                endpoint.replace("http:", "https:"),
                r"does not speak TLS \(\w+\)\. Use http:// in AWS_ENDPOINT_URL",
            ),
            "no host": ("http://no-such-host.invalid", "is not known .*AWS_ENDPOINT_URL"),
            "no server": (
                "http://127.0.0.1:9",
                "there is no answer at http://127.0.0.1:9 .*whether the store runs",
            ),
        }[kind]
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StorageError, match=expected) as caught:
            WAYS[way](url)
        s3fs.S3FileSystem.clear_instance_cache()
    assert storage.is_passing(caught.value) == (kind in ("no host", "no server"))


def test_no_credentials(url, endpoint, clean, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for way in WAYS:
        s3fs.S3FileSystem.clear_instance_cache()
        assert "no credentials were found" in refused(way, url)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_passes_is_asked_again(status: int) -> None:
    """Those of RFC 9110, section 15, that may be of the moment, and 429 of RFC 6585."""
    assert Answer(status, "", "").passes


@pytest.mark.parametrize("status", [400, 403, 404, 412, 501, 505])
def test_a_status_that_stays_is_not(status: int) -> None:
    assert not Answer(status, "", "").passes
