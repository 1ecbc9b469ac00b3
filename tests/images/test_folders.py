"""Folders of images on local disk, in memory and on an S3 server."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, grey, noise, photograph, write
from PIL import Image

from saev import storage
from saev.config import ImgFolder, ImgSegFolder
from saev.errors import ConfigError, ImageError, StorageError
from saev.images import open_dataset

TINY = encode(noise(4, 5))


def keys(dataset: object, root: str) -> list[str]:
    base = storage.normalize(root)
    return [dataset.example(i).url.removeprefix(base + "/") for i in range(len(dataset))]


# --- img-folder ----------------------------------------------------------------------------


def test_class_folders(root: str):
    for i, key in enumerate(["b/2.png", "b/10.PNG", "a/x.png", "a/deep/y.png", "a-b/z.png"]):
        write(storage.join(root, key), noise(6 + i, 7, seed=i))
    for ignored in ["b/.hidden.png", ".cache/q.png", "b/._2.png", "b/notes.txt", "b/2.png.bak"]:
        storage.write_bytes(storage.join(root, ignored), b"x")
    dataset = open_dataset(ImgFolder(root=root))
    # Folder by folder, names by code point; not by the order of writing or of the storage.
    expected = ["a/deep/y.png", "a/x.png", "a-b/z.png", "b/10.PNG", "b/2.png"]
    assert keys(dataset, root) == expected
    assert dataset.classes == ("a", "a-b", "a/deep", "b")
    assert [dataset.example(i)[1:] for i in range(5)] == [
        ("a/deep", 2),
        ("a", 0),
        ("a-b", 1),
        ("b", 3),
        ("b", 3),
    ]
    assert dataset.load(1).tobytes() == noise(8, 7, seed=2).tobytes()
    assert dataset.load_mask(1) is None
    assert storage.exists(dataset.example(0).url)


def test_flat_folder_has_no_classes(root: str):
    for key in ("b.png", "a.png"):
        write(storage.join(root, key), TINY)
    dataset = open_dataset(ImgFolder(root=root))
    assert keys(dataset, root) == ["a.png", "b.png"]
    assert dataset.classes == ()
    assert dataset.example(0)[1:] == ("", -1)


def test_images_beside_class_folders_have_no_class(root: str):
    for key in ("z.png", "cat/a.png"):
        write(storage.join(root, key), TINY)
    dataset = open_dataset(ImgFolder(root=root))
    assert [dataset.example(i)[1:] for i in range(2)] == [("cat", 0), ("", -1)]


def test_digest_is_the_same_on_every_storage(s3_root: str, tmp_path: Path):
    digests = set()
    for root in (str(tmp_path), "memory://digest-test/x", s3_root + "/some/where"):
        for key in ("b/1.png", "a/2.png"):
            write(storage.join(root, key), TINY)
        digests.add(open_dataset(ImgFolder(root=root)).digest)
    storage.delete("memory://digest-test", recursive=True)
    assert len(digests) == 1


def test_digest_changes_with_names_sizes_and_number(tmp_path: Path):
    write(str(tmp_path / "a" / "1.png"), TINY)
    digest = lambda: open_dataset(ImgFolder(root=str(tmp_path))).digest  # noqa: E731
    seen = [digest()]
    write(str(tmp_path / "a" / "1.png"), encode(noise(5, 5)))
    seen.append(digest())
    write(str(tmp_path / "a" / "2.png"), TINY)
    seen.append(digest())
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "3.png")
    seen.append(digest())
    assert len(set(seen)) == 4
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    assert digest() == seen[-1]


GLOB_FILES = ["x/images/cat/1.png", "y/images/cat/2.png", "y/images/dog/3.png", "y/other/4.png"]


def test_glob_of_folders_merges_their_classes(root: str):
    for key in GLOB_FILES:
        write(storage.join(root, key), TINY)
    dataset = open_dataset(ImgFolder(root=storage.join(root, "*/images")))
    assert keys(dataset, root) == GLOB_FILES[:3]
    assert dataset.classes == ("cat", "dog")
    assert [dataset.example(i).target for i in range(3)] == [0, 0, 1]


def test_glob_of_files_names_classes_below_the_fixed_part(root: str):
    for key in [*GLOB_FILES, "top.png", "top.txt", ".hidden.png"]:
        write(storage.join(root, key), TINY)
    flat = open_dataset(ImgFolder(root=storage.join(root, "*.png")))
    assert keys(flat, root) == ["top.png"]
    assert flat.example(0).label == ""
    deep = open_dataset(ImgFolder(root=storage.join(root, "y/*/?.png")))
    assert keys(deep, root) == ["y/other/4.png"]
    assert deep.example(0).label == "other"
    nested = open_dataset(ImgFolder(root=storage.join(root, "**/[12].png")))
    assert [nested.example(i).label for i in range(2)] == ["x/images/cat", "y/images/cat"]


def test_glob_that_matches_a_folder_and_what_is_in_it_counts_every_image_once(root: str):
    for key in GLOB_FILES:
        write(storage.join(root, key), TINY)
    dataset = open_dataset(ImgFolder(root=storage.join(root, "**")))
    assert sorted(keys(dataset, root)) == sorted(GLOB_FILES)


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path):
    write(str(tmp_path / "run[1]" / "a.png"), TINY)
    assert len(open_dataset(ImgFolder(root=str(tmp_path / "run[1]")))) == 1


def test_links_are_followed_and_cycles_end(tmp_path: Path):
    write(str(tmp_path / "store" / "a.png"), TINY)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    dataset = open_dataset(ImgFolder(root=str(tmp_path / "root")))
    assert keys(dataset, str(tmp_path / "root")) == ["cat/a.png"]


def test_name_that_no_table_can_hold(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.png")).write_bytes(TINY)
    with pytest.raises(StorageError, match=r"The name 'cat/.* Rename the file\.") as caught:
        open_dataset(ImgFolder(root=str(tmp_path)))
    str(caught.value).encode()


def test_names_in_any_script(root: str):
    write(storage.join(root, "猫 und Hündin/ça va\u202f#1 100%.png"), TINY)
    dataset = open_dataset(ImgFolder(root=root))
    assert dataset.example(0).label == "猫 und Hündin"
    assert dataset.load(0).size == (5, 4)
    assert len(dataset.digest) == 64


def test_missing_root(root: str):
    with pytest.raises(StorageError, match=r"data\.root is .*/nope, which does not exist\. Check"):
        open_dataset(ImgFolder(root=storage.join(root, "nope")))


def test_root_is_a_file(root: str):
    url = write(storage.join(root, "a.png"), TINY)
    with pytest.raises(StorageError, match=r"a\.png, a file; expected a folder"):
        open_dataset(ImgFolder(root=url))


def test_root_without_images(root: str):
    storage.write_text(storage.join(root, "x/readme.md"), "hello")
    with pytest.raises(StorageError, match=r"No images in .*\.jpg, \.jpeg, .*start with a dot"):
        open_dataset(ImgFolder(root=root))


def test_empty_local_folder(tmp_path: Path):
    with pytest.raises(StorageError, match="No images in"):
        open_dataset(ImgFolder(root=str(tmp_path)))


def test_glob_without_matches_and_without_images(root: str):
    storage.write_text(storage.join(root, "x/readme.md"), "hello")
    with pytest.raises(StorageError, match=r"data\.root is the pattern .*which matches nothing"):
        open_dataset(ImgFolder(root=storage.join(root, "*/images")))
    with pytest.raises(StorageError, match="No images in"):
        open_dataset(ImgFolder(root=storage.join(root, "*")))


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions do not bind root, so act as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", [".", "cat/deep"])
def test_folder_that_may_not_be_read(locked: str):
    """Also one further down: its images must not be left out unnoticed."""
    # Not tmp_path: pytest keeps its folders from other users.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = Path(folder) / "root"
        write(str(root / "b.png"), TINY)
        write(str(root / "cat" / "deep" / "a.png"), TINY)
        cfg = ImgFolder(root=str(root))
        with without_privileges():
            assert len(open_dataset(cfg)) == 2
        (root / locked).chmod(0)
        message = f"{re.escape(str(root / locked))}: permission denied"
        with pytest.raises(StorageError, match=message), without_privileges():
            open_dataset(cfg)
        (root / locked).chmod(0o755)


def test_unreadable_image_names_its_url(root: str):
    url = write(storage.join(root, "cat/a.jpg"), b"GARBAGE")
    dataset = open_dataset(ImgFolder(root=root))
    with pytest.raises(ImageError) as caught:
        dataset.load(0)
    assert str(caught.value).startswith(f"Cannot decode {url}: it is not an image")


def test_image_that_vanished_is_a_storage_error(root: str):
    url = write(storage.join(root, "cat/a.png"), TINY)
    dataset = open_dataset(ImgFolder(root=root))
    storage.delete(url)
    with pytest.raises(StorageError, match="does not exist"):
        dataset.load(0)


# --- img-seg-folder ------------------------------------------------------------------------


def seg_root(root: str, n: int = 3, split: str = "training") -> str:
    for i in range(n):
        values = np.full((6, 8), i, np.uint8)
        write(storage.join(root, "images", split, f"{i}.png"), noise(6, 8, seed=i))
        write(storage.join(root, "annotations", split, f"{i}.png"), grey(values))
    return root


def test_segmentation(root: str):
    seg_root(root)
    write(storage.join(root, "images/training/deep/er/x.v2.jpg"), photograph().resize((8, 6)))
    write(storage.join(root, "annotations/training/deep/er/x.v2.tif"), grey(np.full((6, 8), 9)))
    seg_root(root, n=1, split="validation")
    dataset = open_dataset(ImgSegFolder(root=root, pixel_agg="prefer-fg", bg_label=4))
    assert dataset.has_masks
    assert (dataset.pixel_agg, dataset.bg_label) == ("prefer-fg", 4)
    assert len(dataset) == 4
    for i in range(3):
        image, mask = dataset.load_pair(i)
        assert image.tobytes() == noise(6, 8, seed=i).tobytes()
        assert (np.asarray(mask) == i).all()
    assert (np.asarray(dataset.load_mask(3)) == 9).all()
    assert dataset.example(3).label == ""
    assert len(open_dataset(ImgSegFolder(root=root, split="validation"))) == 1


def test_missing_mask_names_image_and_mask(root: str):
    seg_root(root)
    image = write(storage.join(root, "images/training/1b.jpg"), noise())
    with pytest.raises(StorageError) as caught:
        open_dataset(ImgSegFolder(root=root))
    expected = storage.join(root, "annotations/training/1b")
    assert "1 of 4 images have no mask" in str(caught.value)
    assert f"{image}: expected {expected} with one of .png" in str(caught.value)


def test_mask_without_image_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = seg_root(str(tmp_path))
    write(str(tmp_path / "annotations/training/extra.png"), grey([[0]]))
    assert len(open_dataset(ImgSegFolder(root=root))) == 3
    assert "1 masks in" in caplog.text


def test_two_images_of_one_stem(tmp_path: Path):
    root = seg_root(str(tmp_path))
    write(str(tmp_path / "images/training/1.jpg"), noise())
    with pytest.raises(StorageError, match=r"1\.jpg and .*1\.png have the same stem"):
        open_dataset(ImgSegFolder(root=root))


def test_mask_of_another_size(tmp_path: Path):
    root = seg_root(str(tmp_path))
    write(str(tmp_path / "annotations/training/1.png"), grey(np.zeros((8, 6))))
    dataset = open_dataset(ImgSegFolder(root=root))
    dataset.load_pair(0)
    with pytest.raises(ImageError, match=r"1\.png has 6 x 8 pixels, its image \(upright\) 8 x 6"):
        dataset.load_pair(1)


def test_mask_belongs_to_the_upright_image(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(str(tmp_path / "images/training/a.jpg"), encode(noise(6, 8), "JPEG", exif=exif))
    write(str(tmp_path / "annotations/training/a.png"), grey(np.zeros((8, 6))))
    image, mask = open_dataset(ImgSegFolder(root=str(tmp_path))).load_pair(0)
    assert image.size == mask.size == (6, 8)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "stem,label\n0,cat\n1, tree house\n2,cat\nother,bird\n"),
        ("labels.csv", "\ufeffid, stem, label\r\n5,0,cat\r\n6,1,tree house\r\n7,2,cat\r\n8,z,bird"),
        ("labels.csv", "stem,scene,place\n0,cat,x\n1,tree house,y\n2,cat,z\nz,bird,z\n"),
        ("sceneCategories.txt", "0 cat\n1 tree house\n\n2 cat\nADE_val_1 bird\n"),
    ],
)
def test_labels(root: str, name: str, text: str):
    seg_root(root)
    storage.write_text(storage.join(root, name), text)
    dataset = open_dataset(ImgSegFolder(root=root))
    # Classes of the whole file, so that the splits of a dataset agree about targets.
    assert dataset.classes == ("bird", "cat", "tree house")
    assert [dataset.example(i)[1:] for i in range(3)] == [("cat", 1), ("tree house", 2), ("cat", 1)]


def test_labels_of_nested_images_by_path_or_name(tmp_path: Path):
    for key in ("a/x", "b/x", "c/y"):
        write(str(tmp_path / f"images/training/{key}.png"), TINY)
        write(str(tmp_path / f"annotations/training/{key}.png"), grey(np.zeros((4, 5))))
    (tmp_path / "labels.csv").write_text("stem,label\na/x,one\nb/x,two\ny,three\n")
    dataset = open_dataset(ImgSegFolder(root=str(tmp_path)))
    assert [dataset.example(i).label for i in range(3)] == ["one", "two", "three"]


def test_images_without_label(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = seg_root(str(tmp_path))
    (tmp_path / "labels.csv").write_text("stem,label\n1,cat\n")
    dataset = open_dataset(ImgSegFolder(root=root))
    assert [dataset.example(i)[1:] for i in range(3)] == [("", -1), ("cat", 0), ("", -1)]
    assert "2 of 3 images have no label" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.csv", "image,label\n0,cat\n", "has the columns image, label; expected a header"),
        ("labels.csv", "", r"has the columns \(none\); expected a header"),
        ("labels.csv", "stem,label\n0\n", "line 2: expected a stem and a label"),
        ("labels.csv", "stem,label\n0,cat\n0,dog\n", "gives 0 two labels, 'cat' and 'dog'"),
        ("labels.csv", "stem,label\nimg0.png,cat\n", "name no image of this split; stems are"),
        ("sceneCategories.txt", "0\n", "line 1: expected 'STEM LABEL', found '0'"),
    ],
)
def test_bad_labels(tmp_path: Path, name: str, text: str, message: str):
    root = seg_root(str(tmp_path))
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_dataset(ImgSegFolder(root=root))


def test_digest_covers_images_masks_and_labels(tmp_path: Path):
    root = seg_root(str(tmp_path))
    digest = lambda: open_dataset(ImgSegFolder(root=root)).digest  # noqa: E731
    seen = [digest()]
    write(str(tmp_path / "images/training/1.png"), noise(60, 80))
    seen.append(digest())
    write(str(tmp_path / "annotations/training/1.png"), grey(np.zeros((60, 80))))
    seen.append(digest())
    (tmp_path / "labels.csv").write_text("stem,label\n1,cat\n")
    seen.append(digest())
    (tmp_path / "labels.csv").write_text("stem,label\n1,dog\n")
    seen.append(digest())
    assert len(set(seen)) == 5
    assert digest() == seen[-1]


def test_missing_parts_of_a_segmentation_root(tmp_path: Path):
    root = str(tmp_path)
    with pytest.raises(StorageError, match="has no folder 'images'; expected images/training and"):
        open_dataset(ImgSegFolder(root=root))
    seg_root(root, split="val")
    with pytest.raises(StorageError, match=r"no split 'training' in .*/images; it has val\. Set"):
        open_dataset(ImgSegFolder(root=root))
    with pytest.raises(StorageError, match="nope, which does not exist"):
        open_dataset(ImgSegFolder(root=os.path.join(root, "nope")))
    for i in range(3):
        (tmp_path / f"annotations/val/{i}.png").unlink()
        write(str(tmp_path / f"annotations/val/{i}.jpg"), noise())
    with pytest.raises(StorageError, match=r"No masks in .*/val: it holds 3 other files"):
        open_dataset(ImgSegFolder(root=root, split="val"))
