"""Pictures are drawn from the images that were recorded, or not at all."""

import re
import shutil
import typing as tp
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from described import as_0_1_0
from PIL import Image

from saev import storage
from saev.config import ImgFolder, ImgSegFolder, ShardsConfig
from saev.errors import ConfigError, ImageError, SaevError
from saev.images.datasets import one_name
from saev.shards import Shards, extract
from saev.visuals.source import Source
from visuals.chain import write_photos, write_png

VERSIONS = pytest.mark.parametrize("version", ["0.1.0", "now"])


def record(root: Path, data: ImgFolder | ImgSegFolder) -> str:
    cfg = ShardsConfig(
        shards_root=str(root / "shards"), family="visuals-test", ckpt="tiny", layers=(1,),
        batch_size=8, device="cpu", data=data,
    )  # fmt: skip
    return extract.run(cfg)


def as_version(version: str, shards: str) -> Shards:
    """Version 0.1.0 did not record which file had which size."""
    if version == "0.1.0":
        place = Path(shards, "examples.parquet")
        table = pq.read_table(place).drop_columns(["digest"])
        pq.write_table(table, place)
        shards = as_0_1_0(shards)
    opened = Shards.open(shards)
    assert ("digest" in opened.examples().column_names) == (version == "now")
    return opened


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes whose files have equal names."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(4):
            write_png(tmp_path / "photos" / name / f"{i}.png", 10 * c + i, size=(80 + c, 64))
    return tmp_path / "photos"


def rename_class(photos: Path) -> None:
    (photos / "cat").rename(photos / "kitten")


def swap_classes(photos: Path) -> None:
    (photos / "cat").rename(photos / "x")
    (photos / "dog").rename(photos / "cat")
    (photos / "x").rename(photos / "dog")


def rename_file(photos: Path) -> None:
    (photos / "dog/2.png").rename(photos / "dog/2b.png")


def move_file(photos: Path) -> None:
    (photos / "cat/3.png").rename(photos / "dog/3b.png")


def other_suffix(photos: Path) -> None:
    (photos / "cat/1.png").rename(photos / "cat/1.PNG")


def add(photos: Path) -> None:
    write_png(photos / "cat/11.png", 3)


def remove(photos: Path) -> None:
    (photos / "dog/0.png").unlink()


def other_pixels(photos: Path) -> None:
    write_png(photos / "dog/1.png", 5, size=(82, 64))


def no_picture(photos: Path) -> None:
    (photos / "cat/2.png").write_bytes(b"not a picture")


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (rename_class, r"Image 4 was recorded from .*dog/0\.png.*now has|Image 0 was recorded from "
                   r".*/cat/0\.png; in its place the dataset now has .*/dog/0\.png"),
    (swap_classes, r"cat/0\.png (is not the image that was recorded|has 81 x 64 pixels, it)"),
    (rename_file, r"Image 6 was recorded from .*/dog/2\.png; .* now has .*/dog/2b\.png"),
    (move_file, r"Image 3 was recorded from .*/cat/3\.png; .* now has .*/dog/0\.png"),
    (other_suffix, r"Image 1 was recorded from .*/cat/1\.png; .* now has .*/cat/1\.PNG"),
    (add, r"9 images, 8 were recorded in .*first that was not there is .*/cat/11\.png"),
    (remove, r"7 images, 8 were recorded in .*first that is missing is .*/dog/0\.png"),
    (other_pixels, r"/dog/1\.png (is not the image that was recorded|has 82 x 64 pixels, it had)"),
    (no_picture, r"/cat/2\.png is not the image that was recorded"),
]  # fmt: skip


@VERSIONS
@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda c: getattr(c, "__name__", ""))
def test_any_difference_is_named(
    photos: Path, change: Callable[[Path], None], message: str, version: str
) -> None:
    shards = as_version(version, record(photos.parent, ImgFolder(root=str(photos))))
    assert Source(shards).view(5).name == "1.png"
    change(photos)
    with pytest.raises(SaevError, match=message):
        Source(shards)


def test_the_first_of_equal_pixels(photos: Path) -> None:
    """Only its size in bytes differs, and a table of version 0.1.0 does not have that."""
    url = record(photos.parent, ImgFolder(root=str(photos)))
    Image.new("RGB", (81, 64)).save(photos / "dog/1.png")
    with pytest.raises(ImageError, match=r"dog/1\.png is not the image .* size in bytes of the im"):
        Source(Shards.open(url))
    with pytest.raises(ImageError, match=r"the size in bytes of the image is not .*did not record"):
        Source(as_version("0.1.0", url))


def test_equal_files_elsewhere(photos: Path) -> None:
    shards = Shards.open(record(photos.parent, ImgFolder(root=str(photos))))
    before = Source(shards).view(6)
    moved = photos.parent / "elsewhere" / "below"
    shutil.copytree(photos, moved)
    shutil.rmtree(photos)
    view = Source(shards, ImgFolder(root=str(moved))).view(6)
    assert (view.name, view.label) == (before.name, before.label)
    assert view.image.tobytes() == before.image.tobytes()
    with pytest.raises(ImageError, match=r"recorded from .*/cat/0.png; in its place .*/below/cat/"):
        Source(shards, ImgFolder(root=str(moved.parent)))
    write_photos(str(photos))
    with pytest.raises(ConfigError, match=r"recorded from data:img-folder, .* as data:img-seg"):
        Source(shards, ImgSegFolder(root=str(photos)))


def test_folders_of_a_pattern(photos: Path) -> None:
    shards = Shards.open(record(photos.parent, ImgFolder(root=str(photos.parent / "ph*"))))
    assert Source(shards).view(6).label == "dog"
    (photos.parent / "elsewhere").mkdir()
    photos.rename(photos.parent / "elsewhere/photos")
    moved = str(photos.parent / "elsewhere/ph*")
    assert Source(shards, ImgFolder(root=moved)).view(6).label == "dog"
    (photos.parent / "elsewhere/photos").rename(photos.parent / "elsewhere/phones")
    with pytest.raises(ImageError, match=r"recorded from .*/photos/cat/0\.png; in its place"):
        Source(shards, ImgFolder(root=moved))


def test_a_folder_of_bare_names(tmp_path: Path) -> None:
    """One level of folders less, and the names still end alike: the digest tells."""
    write_png(tmp_path / "a/b/0.png", 0)
    shards = Shards.open(record(tmp_path, ImgFolder(root=str(tmp_path / "a"))))
    with pytest.raises(ImageError, match=r"recorded with the label 'b'; it now has ''"):
        Source(shards, ImgFolder(root=str(tmp_path / "a/b")))


@VERSIONS
def test_masks_and_their_labels(tmp_path: Path, version: str) -> None:
    photos = tmp_path / "photos"
    write_photos(str(photos), n=4)
    data = ImgSegFolder(root=str(photos))
    shards = as_version(version, record(tmp_path, data))
    assert Source(shards).view(1).label

    labels = storage.read_text(str(photos / "labels.csv"))
    storage.write_text(str(photos / "labels.csv"), labels.replace("a&b 2,plain", "a&b 2,fancy"))
    with pytest.raises(ImageError, match=r"Image 2, .*a&b 2\.png, .*label 'plain'.*has 'fancy'"):
        Source(shards)
    storage.write_text(str(photos / "labels.csv"), labels + "other,another\n")
    with pytest.raises(ImageError, match=r"was of class \d when it was recorded"):
        Source(shards)
    storage.write_text(str(photos / "labels.csv"), labels)
    assert Source(shards).view(1).label

    mask = photos / "annotations/training/a&b 3.png"
    Image.effect_noise((80, 64), 50).save(mask)
    which = r"a&b 3\.png is not the image .* of its mask" if version == "now" else "of its mask is"
    with pytest.raises(ImageError, match=which):
        Source(shards)


ACCENTED = ("h\u00e9", "hf", "\u00e9", "z", "na\u00efve \u00e9t\u00e9")
"""Letters that sort elsewhere when they are spelled as two characters."""


def respell(root: Path, form: tp.Literal["NFC", "NFD"]) -> None:
    """Rename all files and folders, as a copy to another file system does."""
    for path in sorted(root.rglob("*"), reverse=True):
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))


def names_of(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*")}


@pytest.mark.parametrize(("before", "after"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("kind", ["classes", "masks"])
@VERSIONS
def test_a_copy_that_spells_names_otherwise(
    tmp_path: Path, version: str, kind: str, before: tp.Any, after: tp.Any
) -> None:
    photos = tmp_path / "photos"
    data: ImgFolder | ImgSegFolder
    if kind == "classes":
        for i, name in enumerate(ACCENTED):
            for j, file in enumerate(ACCENTED):
                write_png(photos / name / f"{file}.png", 10 * i + j, size=(80, 60 + j))
        data = ImgFolder(root=str(photos))
    else:
        write_photos(str(photos), n=5)
        for i, name in enumerate(ACCENTED):
            for part in ("images", "annotations"):
                (photos / part / "training" / f"a&b {i}.png").rename(
                    photos / part / "training" / f"{name}.png"
                )
        rows = [f"{name},{ACCENTED[i % 2]}" for i, name in enumerate(ACCENTED)]
        (photos / "labels.csv").write_text("\n".join(["stem,label", *rows]) + "\n")
        data = ImgSegFolder(root=str(photos))
    respell(photos, before)
    shards = as_version(version, record(tmp_path, data))
    n = shards.n_examples
    urls = shards.examples()["url"].to_pylist()
    pixels = [Image.open(url).tobytes() for url in urls]
    views = [Source(shards).view(i) for i in range(n)]

    was = names_of(photos)
    respell(photos, after)
    assert names_of(photos) != was
    source = Source(shards)
    for i in range(n):
        view = source.view(i)
        assert unicodedata.normalize(before, view.name) == views[i].name
        assert one_name(view.label) == one_name(views[i].label)
        assert view.image.tobytes() == views[i].image.tobytes()
        assert source.dataset.load(i).tobytes() == pixels[i]

    folder = photos / "images" if kind == "masks" else photos
    other = next(p for p in sorted(folder.rglob("*.png")) if not p.name.isascii())
    write_png(other, 99, size=(90, 70))
    with pytest.raises(ImageError, match=re.escape(f"{other} ")):
        Source(shards)


def test_shards_without_a_digest(photos: Path) -> None:
    """Names and labels decide where no digest was recorded."""
    shards = Shards.open(record(photos.parent, ImgFolder(root=str(photos))))
    shards.metadata = shards.metadata.model_copy(update={"data_digest": None})
    assert Source(shards).view(0).label == "cat"
    rename_class(photos)
    with pytest.raises(ImageError, match=r"Image 0 was recorded from .*/cat/0\.png"):
        Source(shards)


def test_the_table_is_of_the_dataset(photos: Path) -> None:
    """What the digest is over, one number per image."""
    shards = Shards.open(record(photos.parent, ImgFolder(root=str(photos))))
    size = (photos / "dog/0.png").stat().st_size
    row = storage.canonical_json(["dog/0.png", "dog", size]).encode()
    assert shards.examples()["digest"][4] == pa.scalar(storage.crc32c(row), pa.uint32())
