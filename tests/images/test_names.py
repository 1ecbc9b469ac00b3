"""Names: Unicode's two spellings are one, and what a folder holds beside images is counted."""

import logging
import unicodedata
from pathlib import Path

import boto3
import numpy as np
import pytest
from pictures import encode, grey, noise, write

from saev import storage
from saev.config import Imagenet, ImgFolder, ImgSegFolder
from saev.errors import ConfigError, StorageError
from saev.images import ImageDataset, open_dataset
from saev.images.datasets import index_classes

NFD, NFC = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
OTHER = {NFD: NFC, NFC: NFD}


def seg(root: str, stems: list[str], split: str = "training", spelled: str = "") -> None:
    """Images with masks; ``spelled`` is how masks spell café."""
    for stem in stems:
        write(storage.join(root, f"images/{split}", f"{stem}.png"), noise(4, 5))
        mask = stem.replace(NFD, spelled).replace(NFC, spelled) if spelled else stem
        write(
            storage.join(root, f"annotations/{split}", f"{mask}.png"),
            grey(np.full((4, 5), len(stem))),
        )


def infos(dataset: ImageDataset) -> list[tuple[str, int]]:
    return [(dataset.example(i).label, dataset.example(i).target) for i in range(len(dataset))]


# --- One name -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [NFD, NFC])
def test_a_mask_of_the_other_spelling_is_found(root: str, image: str):
    seg(root, [image, f"{image}/{image} 2"], spelled=OTHER[image])
    dataset = open_dataset(ImgSegFolder(root=root))
    found = [np.asarray(dataset.load_pair(i)[1]).max() for i in range(2)]
    assert sorted(found) == sorted([len(image), 2 * len(image) + 3])
    # What is stored is the name as the storage has it.
    assert sorted(storage.name(dataset.example(i).url) for i in range(2)) == sorted(
        [f"{image}.png", f"{image} 2.png"]
    )
    storage.read_bytes(dataset.example(0).url)


def test_two_masks_whose_names_are_one(tmp_path: Path):
    seg(str(tmp_path), [NFC])
    write(str(tmp_path / "annotations/training" / f"{NFD}.png"), grey(np.zeros((4, 5))))
    with pytest.raises(StorageError, match="have the same stem"):
        open_dataset(ImgSegFolder(root=str(tmp_path)))


@pytest.mark.parametrize("image", [NFD, NFC])
@pytest.mark.parametrize("file", ["labels.csv", "sceneCategories.txt"])
def test_labels_of_the_other_spelling_are_found(tmp_path: Path, image: str, file: str):
    seg(str(tmp_path), [image, "plain"])
    lines = {
        "labels.csv": f"stem,label\n{OTHER[image]},coffee\nplain,p\n",
        "sceneCategories.txt": f"{OTHER[image]} coffee\nplain p\n",
    }
    (tmp_path / file).write_text(lines[file])
    assert infos(open_dataset(ImgSegFolder(root=str(tmp_path)))) == [("coffee", 0), ("p", 1)]


def test_labels_that_differ_only_in_spelling_are_one_class(tmp_path: Path):
    seg(str(tmp_path), ["a", "b", "c"])
    (tmp_path / "labels.csv").write_text(f"stem,label\na,{NFD}\nb,{NFC}\na,{NFC}\nc,bar\n")
    dataset = open_dataset(ImgSegFolder(root=str(tmp_path)))
    assert dataset.classes == ("bar", NFC)
    assert infos(dataset) == [(NFC, 1), (NFC, 1), ("bar", 0)]


def test_class_folders_of_both_spellings_are_one_class(root: str):
    for folder, name in ((NFD, "a"), (NFC, "b"), ("bar", "c")):
        write(storage.join(root, folder, f"{name}.png"), noise())
    dataset = open_dataset(ImgFolder(root=root))
    assert dataset.classes == ("bar", NFC)
    assert sorted(infos(dataset)) == [("bar", 0), (NFC, 1), (NFC, 1)]


@pytest.mark.parametrize("spelling", [NFD, NFC])
def test_a_class_of_one_spelling_keeps_it(tmp_path: Path, spelling: str):
    write(str(tmp_path / spelling / "a.png"), noise())
    dataset = open_dataset(ImgFolder(root=str(tmp_path)))
    assert dataset.classes == (spelling,)
    assert infos(dataset) == [(spelling, 0)]


def test_order_of_classes_is_that_of_their_names():
    assert index_classes(["b", NFD, "", NFC, "a", "c"]) == (
        ("a", "b", "c", NFC),
        {"a": 0, "b": 1, "c": 2, NFC: 3, NFD: 3, "": -1},
    )


def test_a_split_of_the_other_spelling_is_found(tmp_path: Path):
    seg(str(tmp_path), ["a"], split=NFD)
    assert len(open_dataset(ImgSegFolder(root=str(tmp_path), split=NFC))) == 1


def test_labels_of_rows_that_differ_only_in_spelling(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [noise()] * 3, "label": [NFD, NFC, "bar"]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "ds"))
    dataset = open_dataset(Imagenet(name=str(tmp_path / "ds")))
    assert dataset.classes == ("bar", NFC)
    assert infos(dataset) == [(NFC, 1), (NFC, 1), ("bar", 0)]


# --- What is left out -----------------------------------------------------------------------------


def test_what_is_left_out_is_counted_in_one_line(root: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    for name in ("a.png", "b.JPG", "empty.png"):
        write(storage.join(root, name), noise() if name != "empty.png" else b"")
    for name in (
        "1.HEIC",
        "x/2.heif",
        "photo",
        "notes.txt",
        "v.mp4",
        "w.MP4",
        "x/.hid.png",
        ".c/d",
    ):
        storage.write_bytes(storage.join(root, name), b"x")
    assert len(open_dataset(ImgFolder(root=root))) == 3
    open_dataset(ImgFolder(root=root))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{storage.normalize(root)}: 3 images; left out: 2 HEIC (--data.heic reads them), 1 "
        "without a suffix, 2 hidden, 3 other files (.mp4, .txt); 1 of the images are empty files "
        "(0 bytes)."
    )


def test_what_is_no_image_for_sure_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    write(str(tmp_path / "a.png"), noise())
    (tmp_path / "b.json").write_text("{}")
    open_dataset(ImgFolder(root=str(tmp_path)))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"{tmp_path}: 1 images; left out: 1 other files (.json).")
    ]


def test_nothing_left_out_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    write(str(tmp_path / "a.png"), noise())
    open_dataset(ImgFolder(root=str(tmp_path)))
    assert caplog.text == ""


def test_left_out_of_a_pattern(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("x/images/a.png", "y/images/b.heic", "y/images/c.png"):
        write(str(tmp_path / name), encode(noise()))
    assert len(open_dataset(ImgFolder(root=str(tmp_path / "*/images")))) == 2
    assert "2 images; left out: 1 HEIC (--data.heic reads them)." in caplog.text


def test_masks_are_counted_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seg(str(tmp_path), ["a"])
    (tmp_path / "annotations/training/b").write_bytes(b"x")
    open_dataset(ImgSegFolder(root=str(tmp_path)))
    assert f"{tmp_path}/annotations/training: 1 masks; left out: 1 without a suffix." in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "which is empty|it is empty"),
        (["a.heic", "b.HEIC"], r"it holds 2 HEIC \(--data.heic reads them\)\. Looked"),
        (["a", "b.txt"], r"it holds 1 without a suffix, 1 other files \(\.txt\)\. Looked"),
        ([".a.png"], r"it holds 1 hidden\. Looked at any depth for names that end in .jpg"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(StorageError, match=message):
        open_dataset(ImgFolder(root=str(tmp_path)))


def test_an_object_of_the_roots_name_hides_no_image(s3_root: str):
    """S3 consoles and some tools make such objects."""
    bucket, _, key = s3_root.removeprefix("s3://").partition("/")
    client = boto3.Session().client("s3")
    client.put_object(Bucket=bucket, Key=f"{key}/m1", Body=b"")
    client.put_object(Bucket=bucket, Key=f"{key}/m1/x.png", Body=encode(noise()))
    for root in (f"{s3_root}/m1", f"{s3_root}/m1/", f"{s3_root}/m*", f"{s3_root}/*/x.png"):
        assert len(open_dataset(ImgFolder(root=root))) == 1


def test_a_root_with_two_colons(tmp_path: Path):
    write(str(tmp_path / "a::b/x/1.png"), noise())
    for root in ("a::b", "a::b/*/*.png", "*::b"):
        dataset = open_dataset(ImgFolder(root=str(tmp_path / root)))
        assert dataset.load(0).size == noise().size


# --- HEIC -----------------------------------------------------------------------------------------


def heic(orientation: int = 1) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}  # lossless
    return encode(noise(24, 40), "HEIF", exif=exif.tobytes(), **options)


@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_heic_is_read_if_the_config_says_so(tmp_path: Path, orientation: int):
    from PIL import ImageOps

    (tmp_path / "a.HEIC").write_bytes(heic(orientation))
    write(str(tmp_path / "b.png"), noise())
    assert len(open_dataset(ImgFolder(root=str(tmp_path)))) == 1
    dataset = open_dataset(ImgFolder(root=str(tmp_path), heic=True))
    assert len(dataset) == 2
    stored = noise(24, 40)
    stored.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(stored)
    np.testing.assert_allclose(
        np.asarray(dataset.load(0)).astype(int), np.asarray(expected).astype(int), atol=2
    )


def test_heic_under_another_name_depends_on_the_config_alone(tmp_path: Path):
    from saev.errors import ImageError

    (tmp_path / "a.jpg").write_bytes(heic())  # and pillow-heif is installed and registered by now
    with pytest.raises(ImageError, match="it is not an image of a format that is read"):
        open_dataset(ImgFolder(root=str(tmp_path))).load(0)
    assert open_dataset(ImgFolder(root=str(tmp_path), heic=True)).load(0).size == (40, 24)


def test_damaged_heic(tmp_path: Path):
    from saev.errors import ImageError

    data = heic()
    (tmp_path / "a.heic").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"^Cannot decode .*a\.heic: "):
        open_dataset(ImgFolder(root=str(tmp_path), heic=True)).load(0)


def test_heic_without_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pip install 'saevit\[heic\]'"):
        open_dataset(ImgFolder(root=str(tmp_path), heic=True))


def test_new_keys_rename_nothing_at_their_defaults(tmp_path: Path):
    keys = {"kind", "root", "version"}
    assert set(ImgFolder(root="x").identity()) == keys
    assert set(ImgFolder(root="x", heic=True).identity()) == keys | {"heic"}
    assert set(ImgFolder(root="x", max_pixels=5).identity()) == keys | {"max_pixels"}
    keys |= {"split", "pixel_agg", "bg_label"}
    assert set(ImgSegFolder(root="x").identity()) == keys
    assert set(ImgSegFolder(root="x", mask_orientation="stored").identity()) == keys | {
        "mask_orientation"
    }
    assert set(Imagenet().identity()) == {"kind", "name", "split"}
