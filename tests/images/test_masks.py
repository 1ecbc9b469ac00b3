"""Masks of every mode: which are read, by which map, and what the others are told."""

import logging
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, grey, noise, photograph, write
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from saev.config import ImgSegFolder
from saev.errors import ConfigError, ImageError, StorageError
from saev.images import open_dataset
from saev.images.decode import Limits
from saev.images.masks import MaskMap, decode_mask, read_mask_map


def mask(data: bytes, mask_map: MaskMap | None = None) -> np.ndarray:
    image = decode_mask(data, "m", mask_map=mask_map).image
    assert image.mode == "L"
    return np.asarray(image)


VALUES = [[0, 1, 2], [254, 255, 7]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_grey_masks_keep_their_values(format: str):
    assert mask(encode(grey(VALUES), format)).tolist() == VALUES


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_palette_masks_keep_their_indices(format: str):
    values = np.array([[3, 0, 2], [1, 1, 3]], np.uint8)
    picture = Image.fromarray(values).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9] + [0] * 756)
    np.testing.assert_array_equal(mask(encode(picture, format)), values)


def test_palette_masks_with_few_bits_and_transparency_keep_their_indices():
    values = np.array([[1, 0, 3]], np.uint8)
    picture = Image.fromarray(values).convert("P")
    picture.putpalette([0, 0, 0, 9, 9, 9, 8, 8, 8, 7, 7, 7])
    data = encode(picture, bits=2, transparency=0)
    np.testing.assert_array_equal(mask(data), values)


def test_one_bit_masks_are_0_and_1():
    assert mask(encode(Image.fromarray(np.array([[True, False]])))).tolist() == [[1, 0]]


def test_empty_mask_file():
    with pytest.raises(ImageError, match="Cannot decode m: the file is empty"):
        decode_mask(b"", "m")


def test_mask_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(grey([[1, 2], [3, 4], [5, 6]]), exif=exif)
    assert mask(data).tolist() == [[5, 3, 1], [6, 4, 2]]


# --- Modes that hold labels without being grey ----------------------------------------------


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_labels_are_read_whatever_else_is_beside_them(mode: str, format: str):
    """Grey with an alpha channel, and grey that was saved as colours."""
    with_alpha = Image.merge("LA", (grey(VALUES), grey([[0, 9, 255]] * 2)))
    picture = (with_alpha if "A" in mode else grey(VALUES)).convert(mode)
    assert mask(encode(picture, format)).tolist() == VALUES


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_masks_of_small_values(format: str):
    assert mask(encode(grey(VALUES, np.uint16), format)).tolist() == VALUES


def test_integral_floating_point_masks():
    assert mask(encode(grey(VALUES, np.float32), "TIFF")).tolist() == VALUES
    for values in ([[0.5, 1]], [[float("nan"), 1]]):
        with pytest.raises(ImageError, match="its mode is F, which cannot be a map of labels"):
            decode_mask(encode(grey(values, np.float32), "TIFF"), "m")


# --- Maps -------------------------------------------------------------------------------------


def csv_map(tmp_path: Path, text: str) -> MaskMap:
    place = tmp_path / "map.csv"
    place.write_text(text)
    return read_mask_map(str(place))


def cityscapes_ids() -> np.ndarray:
    """Instance ids as Cityscapes has them: class x 1000 + instance, or the class alone."""
    return np.array([[7, 24000, 24001, 26017], [33999, 0, 7, 25500]], np.uint16)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_values_above_255_by_ranges(tmp_path: Path, format: str):
    ranges = "".join(f"{c}000-{c}999,{c}\n" for c in range(24, 34))
    found = mask(
        encode(Image.fromarray(cityscapes_ids()), format),
        csv_map(tmp_path, f"value,label,name\n{ranges}0-33,0,\n"),
    )
    ids = cityscapes_ids().astype(int)
    np.testing.assert_array_equal(found, np.where(ids >= 1000, ids // 1000, 0))


def test_negative_and_32_bit_values(tmp_path: Path):
    values = np.array([[-1, 70_000, 3]], np.int32)
    found = mask(
        encode(Image.fromarray(values), "TIFF"),
        csv_map(tmp_path, "value,label\n-1,255\n3,3\n*,9\n"),
    )
    assert found.tolist() == [[255, 9, 3]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("columns", ["red,green,blue", "R,G,B"])
def test_colours_by_a_table(tmp_path: Path, mode: str, columns: str):
    colours = np.array([[[128, 0, 0], [0, 128, 0]], [[0, 0, 0], [128, 0, 0]]], np.uint8)
    picture = Image.fromarray(colours)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    table = csv_map(tmp_path, f"name,{columns},label\nbg,0,0,0,0\na,128,0,0,1\nb,0,128,0,200\n")
    assert mask(encode(picture), table).tolist() == [[1, 200], [0, 1]]


def test_ade20ks_full_masks(tmp_path: Path):
    """Red and green code the class, as in ADE20K's own index_ade20k code: R // 10 * 256 + G."""
    rng = np.random.default_rng(0)
    classes, instances = rng.integers(1, 400, (9, 11)), rng.integers(1, 256, (9, 11))
    rgb = np.stack([classes // 256 * 10, classes % 256, instances], axis=2).astype(np.uint8)
    wanted = {int(c): i for i, c in enumerate(np.unique(classes)[:100], start=1)}
    rows = "".join(f"{c // 256 * 10},{c % 256},*,{label}\n" for c, label in wanted.items())
    found = mask(
        encode(Image.fromarray(rgb)), csv_map(tmp_path, f"red,green,blue,label\n{rows}*,*,*,0\n")
    )
    expected = [[wanted.get(int(c), 0) for c in row] for row in classes]
    assert found.tolist() == expected


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_the_palette_of_an_image_is_a_map(tmp_path: Path, suffix: str):
    """As for PASCAL VOC, whose masks exist as indexed and as colour images."""
    indexed = Image.fromarray(np.array([[3, 1], [0, 2]], np.uint8)).convert("P")
    indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    place = write(str(tmp_path / f"voc.{suffix}"), indexed)
    found = mask(encode(indexed.convert("RGB")), read_mask_map(place))
    assert found.tolist() == [[3, 1], [0, 2]]


def test_a_map_is_decoded_as_images_are(tmp_path: Path):
    """Long texts do not matter, the limit on pixels does, and nothing is started to read it."""
    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    indexed = Image.fromarray(np.array([[1, 0]], np.uint8)).convert("P")
    indexed.putpalette([9, 8, 7, 6, 5, 4])
    found = read_mask_map(write(str(tmp_path / "a.png"), encode(indexed, pnginfo=info)))
    assert found.rows[:2] == ((((9, 9), (8, 8), (7, 7)), 0), (((6, 6), (5, 5), (4, 4)), 1))
    large = write(str(tmp_path / "b.png"), encode(Image.new("P", (30, 20))))
    with pytest.raises(ConfigError, match="it has 30 x 20 pixels, at most 500 are decoded"):
        read_mask_map(large, Limits(max_pixels=500))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EOF\n"
    with pytest.raises(ConfigError, match="is neither a CSV file"):
        read_mask_map(write(str(tmp_path / "c.eps"), postscript))


def test_a_value_without_a_label_is_named(tmp_path: Path):
    values = csv_map(tmp_path, "value,label\n1,1\n")
    with pytest.raises(
        ConfigError, match=r"m: .*map\.csv .* no label for the value 300.* row \*,0"
    ):
        decode_mask(encode(grey([[1, 300]], np.uint16)), "m", mask_map=values)
    colours = csv_map(tmp_path, "r,g,b,label\n1,2,3,1\n")
    with pytest.raises(
        ConfigError, match=r"no label for the colour red 9, green 8, blue 7\. .*\*,0"
    ):
        decode_mask(encode(Image.new("RGB", (2, 2), (9, 8, 7))), "m", mask_map=colours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stem,label\na,b\n",
            "has the columns stem, label; expected red,green,blue,label or value",
        ),
        ("value\n1\n", "has the columns value; expected"),
        ("value,label\n", "has no row"),
        ("value,label\n1,256\n", "line 2: the label is '256', expected 0 to 255"),
        ("value,label\n1,-1\n", "line 2: the label is '-1', expected 0 to 255"),
        ("value,label\n1,\n", "line 2: the label is '', expected 0 to 255"),
        ("value,label\n0x1,1\n", "line 2: '0x1' is not a number, a range such as 1-9"),
        ("value,label\n9-1,1\n", "line 2: '9-1' is not a number, a range"),
        ("value,label\n1,1\n1,2\n", "line 3: the same pixels had the label 1 before, now 2"),
    ],
)
def test_a_map_that_is_none(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        csv_map(tmp_path, text)


def test_an_image_that_is_no_map(tmp_path: Path):
    with pytest.raises(ConfigError, match="is an image of mode RGB, which has no palette"):
        read_mask_map(write(str(tmp_path / "a.png"), noise()))
    with pytest.raises(ConfigError, match=r"is neither a CSV file, called \.csv, nor an image"):
        read_mask_map(write(str(tmp_path / "a.png"), b"value,label"))


# --- What cannot be labels ---------------------------------------------------------------------


def test_colours_without_a_map_name_the_map_and_remove_nothing():
    """Also where unreadable files are left out: it is not the mask that is wrong."""
    picture = Image.fromarray(np.array([[[128, 0, 0], [0, 128, 0]]], np.uint8))
    with pytest.raises(ConfigError) as caught:
        decode_mask(encode(picture), "m")
    assert "mask m has 2 colours, and it is not known which labels" in str(caught.value)
    assert "--data.mask-map FILE with the columns red,green,blue,label" in str(caught.value)
    assert "remove" not in str(caught.value)
    assert "skip" not in str(caught.value)


def test_values_above_255_without_a_map_name_the_map():
    for values, named in (([[3, 300]], 300), ([[3, 65535]], 65535)):
        with pytest.raises(
            ConfigError, match=f"has the value {named}, and labels are 0 to 255.*-map"
        ):
            decode_mask(encode(grey(values, np.uint16)), "m")


def test_colours_with_a_map_of_values(tmp_path: Path):
    picture = Image.fromarray(np.array([[[128, 0, 0], [0, 128, 0]]], np.uint8))
    with pytest.raises(ConfigError, match=r"has colours, and .* is a map of values"):
        decode_mask(encode(picture), "m", mask_map=csv_map(tmp_path, "value,label\n*,0\n"))


def test_a_photograph_is_no_mask():
    with pytest.raises(ImageError, match=r"m: it has \d+ colours, as photographs have") as caught:
        decode_mask(encode(photograph()), "m")
    assert "remove" not in str(caught.value)
    with pytest.raises(ImageError, match="its mode is CMYK, which cannot be a map of labels"):
        decode_mask(encode(photograph().convert("CMYK"), "TIFF"), "m")


# --- In a dataset --------------------------------------------------------------------------------


def dataset_root(tmp_path: Path, picture: Image.Image | bytes) -> str:
    write(str(tmp_path / "images/training/a.png"), noise(2, 2))
    write(str(tmp_path / "annotations/training/a.png"), picture)
    return str(tmp_path)


def test_a_dataset_reads_its_map_and_is_told_by_what_it_says(tmp_path: Path):
    colours = np.array([[[9, 0, 0], [0, 9, 0]], [[0, 0, 0], [9, 0, 0]]], np.uint8)
    root = dataset_root(tmp_path / "data", Image.fromarray(colours))
    text = "red,green,blue,label\n9,0,0,1\n0,9,0,2\n*,*,*,0\n"
    (tmp_path / "data/map.csv").write_text(text)
    (tmp_path / "elsewhere.csv").write_text(text)
    digests = set()
    for place in ("map.csv", str(tmp_path / "elsewhere.csv")):
        dataset = open_dataset(ImgSegFolder(root=root, mask_map=place))
        assert np.asarray(dataset.load_pair(0)[1]).tolist() == [[1, 2], [0, 1]]
        assert np.asarray(dataset.load_mask(0)).tolist() == [[1, 2], [0, 1]]
        digests.add(dataset.digest)
    assert len(digests) == 1
    (tmp_path / "elsewhere.csv").write_text(text.replace(",2", ",3"))
    cfg = ImgSegFolder(root=root, mask_map=str(tmp_path / "elsewhere.csv"))
    digests |= {open_dataset(cfg).digest, open_dataset(ImgSegFolder(root=root)).digest}
    assert len(digests) == 3


def test_a_map_that_is_missing(tmp_path: Path):
    root = dataset_root(tmp_path, grey([[1, 2], [0, 1]]))
    with pytest.raises(StorageError, match=r"data.mask_map is .*nope\.csv, which does not exist"):
        open_dataset(ImgSegFolder(root=root, mask_map="nope.csv"))


# --- Orientation ---------------------------------------------------------------------------------


def turned_root(tmp_path: Path, orientation: int, own: int = 1, shape: tuple[int, int] = (3, 3)):
    """An image with an EXIF orientation whose mask was drawn on its stored pixels."""
    rng = np.random.default_rng(orientation)
    stored = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    labels = Image.fromarray(np.asarray(stored)[..., 0].copy())
    exif, own_exif = Image.Exif(), Image.Exif()
    exif[0x0112], own_exif[0x0112] = orientation, own
    for i in range(2):
        write(str(tmp_path / f"images/training/{i}.png"), encode(stored, exif=exif))
        data = encode(labels, exif=own_exif) if own != 1 else encode(labels)
        write(str(tmp_path / f"annotations/training/{i}.png"), data)
    return str(tmp_path)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 3), (2, 5)])
def test_masks_of_stored_pixels_follow_their_images(tmp_path, orientation, shape):
    root = turned_root(tmp_path, orientation, shape=shape)
    dataset = open_dataset(ImgSegFolder(root=root, mask_orientation="stored"))
    image, labels = dataset.load_pair(0)
    # The labels are the red channel, so that they say where each pixel went.
    np.testing.assert_array_equal(np.asarray(labels), np.asarray(image)[..., 0])
    np.testing.assert_array_equal(np.asarray(dataset.load_mask(0)), np.asarray(labels))
    assert dataset.notes() == []


def test_masks_as_displayed_stay_and_are_counted(tmp_path, caplog):
    root = turned_root(tmp_path, 3)
    dataset = open_dataset(ImgSegFolder(root=root))
    for i in (0, 1, 0):
        image, labels = dataset.load_pair(i)
        stored = ImageOps.flip(ImageOps.mirror(image))
        np.testing.assert_array_equal(np.asarray(labels), np.asarray(stored)[..., 0])
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "0.png has an EXIF orientation (3) and its mask has none" in warnings[0]
    assert "--data.mask-orientation displayed" in warnings[0]
    assert dataset.notes() == [
        "2 masks belong to images with an EXIF orientation; see the warning above."
    ]


def test_who_says_how_masks_lie_is_not_warned(tmp_path, caplog):
    root = turned_root(tmp_path, 3)
    dataset = open_dataset(ImgSegFolder(root=root, mask_orientation="displayed"))
    dataset.load_pair(0)
    assert caplog.text == ""
    assert dataset.notes() == []


@pytest.mark.parametrize("wanted", [None, "displayed", "stored"])
def test_a_mask_with_an_orientation_of_its_own_follows_it(tmp_path, caplog, wanted):
    root = turned_root(tmp_path, 6, own=6, shape=(2, 5))
    dataset = open_dataset(ImgSegFolder(root=root, mask_orientation=wanted))
    image, labels = dataset.load_pair(0)
    np.testing.assert_array_equal(np.asarray(labels), np.asarray(image)[..., 0])
    assert caplog.text == ""


def test_a_mask_of_another_size_is_told_about_orientation(tmp_path):
    dataset = open_dataset(ImgSegFolder(root=turned_root(tmp_path, 6, shape=(2, 5))))
    with pytest.raises(
        ImageError, match=r"they must agree\. .*\(6\).*--data.mask-orientation stored"
    ):
        dataset.load_pair(0)


def test_a_mask_that_claims_more_pixels_than_its_image_is_not_decoded(tmp_path):
    huge = encode(Image.new("1", (3000, 3000)))
    dataset = open_dataset(ImgSegFolder(root=dataset_root(tmp_path, huge)))
    with pytest.raises(
        ImageError, match=r"has 9000000 pixels, its image .upright. 2 x 2; they must"
    ):
        dataset.load_pair(0)
