"""Places that stored files name: which are opened."""

from pathlib import Path

import pydantic
import pytest

from saev import storage
from saev.errors import ConfigError, CorruptDataError
from saev.inference.codes import CodesInfo
from saev.shards import ShardInfo
from saev.steps.discover import Dataset

LOCAL, S3 = "/data/shards/0123456789abcdef", "s3://bucket/main/shards/0123456789abcdef"

OUTSIDE = [
    "../../etc/hostname", "/etc/hostname", "..", ".", "", "a/b.webp", "a\\b.webp",
    "http://127.0.0.1/x", "s3://bucket/x", "file:///etc/hostname", "a\n.webp", "a\0.webp",
    "zip://x::http://h/y",
]  # fmt: skip


@pytest.mark.parametrize("name", [*OUTSIDE, None, 3, ["a"]])
def test_names_that_lead_out_of_their_folder(name: object, tmp_path: Path) -> None:
    assert not storage.is_file_name(name)
    with pytest.raises(CorruptDataError, match="expected the name of a file beside it"):
        storage.inside(str(tmp_path), name)  # type: ignore[arg-type]
    codes = {"name": "0.codes", "n_latents": 1, "n_bytes": 0, "checksum": "", "pieces": []}
    CodesInfo.model_validate(codes)
    shard = pydantic.TypeAdapter(ShardInfo)
    shard.validate_python({"name": "acts000000.bin", "n_examples": 0})
    for validate, raw in (
        (CodesInfo.model_validate, {**codes, "name": name}),
        (shard.validate_python, {"name": name, "n_examples": 0}),
    ):
        with pytest.raises(pydantic.ValidationError):
            validate(raw)
    dataset = {"name": "d", "url": "", "fingerprint": "f", "key": "k", "version": "", "marker": ""}
    assert Dataset.from_dict(dataset).name == "d"
    for field in ("name", "key", "fingerprint"):
        with pytest.raises(ConfigError, match="expected"):
            Dataset.from_dict({**dataset, field: name})


@pytest.mark.parametrize("name", ["00-plain.webp", "acts000000.bin", "..a", "a b", "ä.png", "a:b"])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    assert storage.inside(tmp_path, name) == str(tmp_path / name)
    assert storage.inside(S3, name) == f"{S3}/{name}"


def test_a_link_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "own").write_text("y")
    (folder / "near").symlink_to(folder / "own")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    assert storage.inside(folder, "near") == str(folder / "near")
    for names in (("out",), ("up", "secret")):
        with pytest.raises(CorruptDataError, match=r"is a link to .*secret, outside"):
            storage.inside(folder, *names)


@pytest.mark.parametrize(
    ("url", "record"),
    [
        ("/data/photos", LOCAL), ("/data/photos", S3), ("file:///data/photos", LOCAL),
        ("/data/*/train", LOCAL), ("/data/a::b", LOCAL), ("/dev/shm/photos", LOCAL),
        ("s3://bucket/photos", S3), ("s3://bucket", S3), ("memory://x/photos", "memory://y/shards"),
    ],
)  # fmt: skip
def test_folders_that_are_opened(url: str, record: str) -> None:
    assert storage.recorded_folder(url, record, "Say --x.") == storage.normalize(url)


@pytest.mark.parametrize("record", [LOCAL, S3, "memory://y/shards"])
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/photos", "https://h/x", "ftp://h/x", "s3://other/photos",
        "s3://bucket2/photos", "gs://bucket/photos", "zip://::http://127.0.0.1:9/x.zip",
        "zip://a::/data/x.zip", "simplecache::s3://bucket/x", "github://o/r", "ssh://h/x",
        "/proc", "/proc/self/cwd/etc", "/sys/kernel", "/dev", "/", "/data/../proc", "photos",
        "../photos", "*", "/pro*/self", "", None, {"a": 1}, "/data\n/x", "/[p]roc",
    ],
)  # fmt: skip
def test_folders_that_are_not(url: object, record: str) -> None:
    with pytest.raises(ConfigError, match=r"--data\.root"):
        storage.recorded_folder(url, record, "Say --data.root.")


def test_a_link_to_a_kernels_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to("/proc/self")
    with pytest.raises(ConfigError, match="no plain folder"):
        storage.recorded_folder(str(tmp_path / "photos"), LOCAL, "")


def test_links_out_of_a_recorded_folder(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    (photos / "cat/0.png").write_bytes(b"x")
    (photos / "cat/1.png").symlink_to(photos / "cat/0.png")
    (photos / "cats").symlink_to(photos / "cat")
    (tmp_path / "link").symlink_to(photos)
    for place in (photos, tmp_path / "link", photos / "c*"):
        storage.check_closed(str(place), LOCAL, "Say --data.root.")
    for target in ("/etc", "/etc/hostname", "../../outside"):
        (photos / "cat/out").symlink_to(target)
        for place in (photos, tmp_path / "link", photos / "c*"):
            with pytest.raises(ConfigError, match=r"cat/out is a link to .*Say --data\.root"):
                storage.check_closed(str(place), LOCAL, "Say --data.root.")
        (photos / "cat/out").unlink()


def test_below() -> None:
    assert storage.is_below("/data/a/b.png", "/data/a")
    assert storage.is_below("s3://b/a/b.png", "s3://b/a/")
    for url in ("/data/ab.png", "/data/a", "/data/a/../b.png", "http://h/data/a/x", "b.png"):
        assert not storage.is_below(url, "/data/a")
