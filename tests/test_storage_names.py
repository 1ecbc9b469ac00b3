"""saev.storage: names that look like something else, and keys that must not be shown."""

import io
import logging
import subprocess
import sys
import uuid
from pathlib import Path

import boto3
import pytest
from described import files_below

from saev import storage
from saev.config.base import Config
from saev.config.images import ImgFolder
from saev.errors import ConfigError, SaevError, StorageError
from saev.secrets import RedactingFilter, redact

# --- Names with `::` and with the characters of patterns ------------------------------------


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on a disk, and on an S3 server."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"


@pytest.mark.parametrize("folder", ["a::b", "::", "zip::x", "s3::b", "a[1]", "a*", "wh?t"])
def test_a_folder_of_any_name_works_everywhere(root: str, folder: str) -> None:
    base = storage.join(root, folder)
    url = storage.join(base, "sub", "x::y.bin")
    storage.write_bytes(url, b"hello")
    with storage.open_write(storage.join(base, "z")) as handle:
        handle.write(b"z")
    assert storage.create(storage.join(base, "made"), b"1")
    assert storage.exists(url)
    assert storage.is_dir(base)
    assert not storage.is_dir(url)
    assert storage.size(url) == 5
    assert storage.read_bytes(url) == b"hello"
    with storage.open_read(url) as handle:
        assert handle.read() == b"hello"
    with storage.RangeReader(url) as reader:
        assert reader.read(1, 3) == b"ell"
    assert [e.name for e in storage.list_dir(base)] == ["made", "sub", "z"]
    assert files_below(base) == [storage.join(base, n) for n in ("made", "sub/x::y.bin", "z")]
    assert [o.key for o in sorted(storage.walk(base))] == ["made", "sub/x::y.bin", "z"]
    storage.check_writable(base)
    storage.delete(url)
    assert not storage.exists(url)
    storage.delete(base, recursive=True)
    assert not storage.exists(base)


def test_a_relative_path_with_two_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("a::b/x", b"1")
    assert [o.key for o in storage.walk("a::b")] == ["x"]
    assert [e.name for e in storage.list_dir("a::b")] == ["x"]
    assert [e.url for e in storage.glob("a::b/*")] == [str(tmp_path / "a::b" / "x")]


def test_a_chain_of_protocols_is_one(tmp_path: Path) -> None:
    import zipfile

    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("in/a.txt", "hello")
    assert storage.read_text(f"zip://in/a.txt::{archive}") == "hello"
    assert storage.read_text(f"zip://in/a.txt::file://{archive}") == "hello"


@pytest.mark.parametrize("recursive", [False, True])
def test_deleting_removes_that_name_and_not_what_it_matches(root: str, recursive: bool) -> None:
    for folder in ("run[1]", "run1", "run*"):
        storage.write_bytes(storage.join(root, folder, "x"), b"1")
    for folder in ("run[1]", "run*"):
        name = [folder] if recursive else [folder, "x"]
        storage.delete(storage.join(root, *name), recursive=recursive)
    left = [o.key for o in sorted(storage.walk(root))]
    assert left == ["run1/x"]


# --- Objects that are called like a folder --------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not empty"])
def test_an_object_of_the_prefixs_name_hides_nothing(s3: str, content: bytes) -> None:
    hides_nothing(s3, "m1", content)


def test_an_object_of_the_prefixs_name_and_a_slash_hides_nothing(s3: str) -> None:
    hides_nothing(s3, "m1/", b"")


def test_such_an_object_with_content_hides_nothing(s3: str) -> None:
    hides_nothing(s3, "m1/", b"not empty")


def hides_nothing(s3: str, marker: str, content: bytes) -> None:
    """Write an object of the folder's name, and look at the folder in every way."""
    prefix = uuid.uuid4().hex
    client, bucket = boto3.Session().client("s3"), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key=f"{prefix}/{marker}", Body=content)
    for name in ("x.png", "sub/y.png"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/m1/{name}", Body=b"png")
    for url in (f"{s3}/{prefix}/m1", f"{s3}/{prefix}/m1/"):
        place = storage.normalize(url)
        assert storage.exists(url)
        assert storage.is_dir(url)
        assert files_below(url) == [f"{place}/sub/y.png", f"{place}/x.png"]
        assert [o.key for o in sorted(storage.walk(url))] == ["sub/y.png", "x.png"]
        assert [(e.name, e.is_dir) for e in storage.list_dir(url)] == [
            ("sub", True),
            ("x.png", False),
        ]
    found = {(e.name, e.is_dir) for e in storage.glob(f"{s3}/{prefix}/**")}
    assert {("x.png", False), ("y.png", False), ("sub", True)} <= found
    storage.delete(f"{s3}/{prefix}/m1", recursive=True)
    assert files_below(f"{s3}/{prefix}") == []


def test_a_folder_that_only_its_marker_makes_is_empty(s3: str) -> None:
    prefix = uuid.uuid4().hex
    boto3.Session().client("s3").put_object(
        Bucket=s3.removeprefix("s3://"), Key=f"{prefix}/empty/", Body=b""
    )
    url = f"{s3}/{prefix}/empty"
    assert storage.is_dir(url)
    assert [*storage.walk(url)] == storage.list_dir(url) == []


def test_a_file_is_no_folder(root: str) -> None:
    url = storage.join(root, "x")
    storage.write_bytes(url, b"1")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        next(storage.walk(url))


# --- Keys inside URLs -------------------------------------------------------------------------

KEYS = {
    "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG@bucket/x": "s3://***@bucket/x",
    "s3://AKIAIOSFODNN7EXAMPLE@bucket/x": "s3://***@bucket/x",
    "https://user:pa/ss@host:9000/x?y=1": "https://***@host:9000/x?y=1",
    "https://ghp_token@host/x": "https://***@host/x",
    "sftp://user:pw@host/x": "sftp://***@host/x",
    "https://b.s3.amazonaws.com/x?X-Amz-Algorithm=A&X-Amz-Credential=AKIA%2F1&X-Amz-Signature=c0": (
        "https://b.s3.amazonaws.com/x?X-Amz-Algorithm=A&X-Amz-Credential=***&X-Amz-Signature=***"
    ),
    "https://a.blob.core.windows.net/c/x?sv=2022&sig=abc%3D": (
        "https://a.blob.core.windows.net/c/x?sv=2022&sig=***"
    ),
    "https://storage.googleapis.com/b/x?GoogleAccessId=me&Signature=abc&Expires=1": (
        "https://storage.googleapis.com/b/x?GoogleAccessId=***&Signature=***&Expires=1"
    ),
    "zip://a.png::https://u:p@host/x.zip": "zip://a.png::https://***@host/x.zip",
    "ViT-B-32@https://host/w.pt?token=abc": "ViT-B-32@https://host/w.pt?token=***",
}
NONE = (
    "s3://bucket/a:b@c/x.png",
    "http://minio:9000/bucket/x@2.png",
    "sftp://user@host/x",
    "abfs://container@account.dfs.core.windows.net/x",
    "ViT-B-32@s3://bucket/w.pt",
    "s3://bucket/x?versionId=abc",
    "/local/a@b:c?token=5",
    "https://host/x?page=2",
)


@pytest.mark.parametrize(("url", "shown"), KEYS.items())
def test_a_key_in_a_url_is_hidden_and_refused(url: str, shown: str) -> None:
    assert redact(url) == redact(shown) == shown
    assert (
        redact(f"Cannot read {url}: no. See '{url}'.") == f"Cannot read {shown}: no. See '{shown}'."
    )
    assert str(SaevError(f"a {url} b")) == f"a {shown} b"
    with pytest.raises(ConfigError) as refused:
        ImgFolder.from_dict({"root": url})
    assert "root: " in str(refused.value)
    assert shown in str(refused.value)
    assert url not in str(refused.value)
    assert "environment" in str(refused.value)
    if "@https" not in url:
        for use in (storage.exists, storage.read_bytes, storage.normalize, storage.walk):
            with pytest.raises(StorageError, match="takes no keys in URLs") as caught:
                use(url)
            assert url not in str(caught.value)


@pytest.mark.parametrize("url", NONE)
def test_what_is_no_key_is_left_alone(url: str) -> None:
    assert redact(url) == url
    assert ImgFolder.from_dict({"root": url}).root == url


def test_logs_hide_keys() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactingFilter())
    logger = logging.Logger("x")
    logger.addHandler(handler)
    logger.warning("Cannot open %s (%d)", "https://u:p@host/x", 3)
    assert stream.getvalue() == "Cannot open https://***@host/x (3)\n"


def test_a_config_that_was_stored_with_a_key_is_read(tmp_path: Path) -> None:
    """Nobody loses results of an earlier version; what opens the URL refuses it."""

    class Stored(Config):
        data: ImgFolder

    url = "https://user:pw@host/x"
    storage.write_json(tmp_path / "c.json", {"data": {"kind": "img-folder", "root": url}})
    assert Stored.from_dict(storage.read_json(tmp_path / "c.json"), stored=True).data.root == url


@pytest.mark.parametrize("module", ["saev", "pipelines"])
def test_a_command_line_with_a_key_is_refused_without_showing_it(module: str) -> None:
    url = "s3://AKIAEXAMPLE:wJalrXUtnFEMI/K7MDENG@bucket/x"
    argv = [sys.executable, "-m", module, "submit", "--no-such-flag", f"--root={url}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: --root=s3://***@bucket/x has a key in it" in done.stderr
    assert "wJalr" not in done.stdout + done.stderr
