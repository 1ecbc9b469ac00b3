"""Every mode and every defect that image files come with."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import PHOTOGRAPHS, encode, grey, noise, photograph
from PIL import Image, ImageOps

from saev.errors import ImageError
from saev.images import decode
from saev.images.decode import decode_image, decode_mask


def rgb(data: bytes) -> np.ndarray:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --- Images --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM"]
)
def test_photographs_decode_as_pil_decodes_them(name: str, format: str):
    data = encode(photograph(name).reduce(4), format)
    with Image.open(io.BytesIO(data)) as expected:
        np.testing.assert_array_equal(rgb(data), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format: str, orientation: int):
    picture = photograph().resize((30, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format in ("JPEG", "WEBP") else {}
    data = encode(picture, format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert expected.size == ((20, 30) if orientation >= 5 else (30, 20))
    np.testing.assert_array_equal(rgb(data), np.asarray(expected))


def test_orientation_is_not_left_behind_in_the_decoded_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(encode(noise(), "JPEG", exif=exif), "x")
    again = decode_image(encode(image, "PNG"), "x")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
    assert image.getexif().get(0x0112) is None


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_nonsense_orientation_is_ignored(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert rgb(encode(noise(8, 12), "JPEG", exif=exif)).shape == (8, 12, 3)


def test_broken_exif_is_ignored():
    data = encode(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert rgb(data).shape == (8, 12, 3)


def test_palette():
    picture = noise().quantize(16)
    np.testing.assert_array_equal(rgb(encode(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_palette_with_transparency_is_laid_over_white(transparency: int | bytes):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 0, 0, 0, 100, 100, 100])
    found = rgb(encode(picture, transparency=transparency))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[0, 1].tolist() == [255, 255, 255]
    half = [178, 178, 178] if isinstance(transparency, bytes) else [100, 100, 100]
    np.testing.assert_allclose(found[0, 2], half, atol=1)


def test_transparent_gif_is_laid_over_white():
    picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 0, 0, 0])
    assert rgb(encode(picture, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_rgba_is_laid_over_white(format: str):
    pixels = np.array([[[200, 0, 0, 255], [0, 0, 0, 0], [0, 0, 200, 128]]], np.uint8)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    found = rgb(encode(Image.fromarray(pixels), format, **options))
    expected = [[200, 0, 0], [255, 255, 255], [127, 127, 227]]
    np.testing.assert_allclose(found[0], expected, atol=1)


def test_grey_with_alpha_is_laid_over_white():
    picture = Image.fromarray(np.array([[[50, 255], [50, 0], [50, 128]]], np.uint8), "LA")
    np.testing.assert_allclose(rgb(encode(picture))[0, :, 0], [50, 255, 152], atol=1)


def test_grey_and_rgb_with_a_transparent_colour():
    assert rgb(encode(grey([[7, 9]]), transparency=9))[0, :, 0].tolist() == [7, 255]
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert rgb(encode(picture, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255] * 3]


def test_one_bit():
    picture = Image.fromarray(np.array([[True, False]]))
    assert rgb(encode(picture))[0].tolist() == [[255] * 3, [0] * 3]


def test_cmyk_as_pil_converts_it():
    picture = photograph().resize((40, 30)).convert("CMYK")
    found = rgb(encode(picture, "JPEG", quality=95))
    np.testing.assert_allclose(found, np.asarray(picture.convert("RGB")), atol=40)
    assert abs(found - np.asarray(picture.convert("RGB"))).mean() < 4  # not inverted
    np.testing.assert_array_equal(rgb(encode(picture, "TIFF")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format: str):
    values = [[0, 128, 129, 257, 1000, 32768, 65407, 65535]]
    found = rgb(encode(grey(values, np.uint16), format))
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 4, 128, 255, 255]
    assert (found[..., :1] == found).all()


def test_16_bit_big_endian_tiff():
    picture = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert rgb(encode(picture, "TIFF"))[0, :, 0].tolist() == [1, 255]


def test_32_bit_integers_outside_of_16_bits_have_no_meaning():
    with pytest.raises(ImageError, match="values go from 0 to 70000"):
        decode_image(encode(grey([[0, 70_000]], np.int32), "TIFF"), "x")
    with pytest.raises(ImageError, match="values go from -3 to 5"):
        decode_image(encode(grey([[-3, 5]], np.int32), "TIFF"), "x")


def test_floating_point():
    data = encode(grey([[0, 0.5, 1]], np.float32), "TIFF")
    assert rgb(data)[0, :, 0].tolist() == [0, 128, 255]
    for bad in ([[0, 2.5]], [[-1, 0]], [[0, float("nan")]]):
        with pytest.raises(ImageError, match="floating point ones are 0 to 1"):
            decode_image(encode(grey(bad, np.float32), "TIFF"), "x")


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_first_frame_counts(format: str):
    first, second = (Image.new("RGB", (9, 8), colour) for colour in ("red", "blue"))
    data = encode(first, format, save_all=True, append_images=[second])
    np.testing.assert_allclose(rgb(data)[0, 0], [255, 0, 0], atol=3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(format: str, share: float):
    data = encode(photograph().resize((200, 100)), format)
    with pytest.raises(ImageError, match=r"^Cannot decode s3://b/cat\.x: .*--skip-unreadable\.$"):
        decode_image(data[: int(len(data) * share)], "s3://b/cat.x")


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_an_image_error_or_a_picture(seed: int):
    """Whatever happens to a file, nothing but ImageError ever comes out."""
    rng = np.random.default_rng(seed)
    format = ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"][seed % 6]
    data = bytearray(encode(photograph().resize((60, 40)), format))
    for position in rng.integers(0, len(data), 8):
        data[position] = rng.integers(256)
    message = "Cannot decode x: "
    try:
        assert decode_image(bytes(data), "x").mode == "RGB"
    except ImageError as err:
        message = str(err)
    assert message.startswith("Cannot decode x: ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"GARBAGE" * 100, "it is not an image of a format that is read"),
        (b"<html><body>404</body></html>", "it is not an image of a format that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not an image of a format"),
    ],
)
def test_not_an_image(data: bytes, reason: str):
    with pytest.raises(ImageError) as caught:
        decode_image(data, "/data/cat.jpg")
    assert str(caught.value).startswith(f"Cannot decode /data/cat.jpg: {reason}")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_before_it_is_decoded():
    for decoder in (decode_image, decode_mask):
        with pytest.raises(ImageError, match=r"Cannot decode bomb\.png: .*pixels"):
            decoder(png_header(60_000, 60_000), "bomb.png")


def test_our_own_limit_holds_where_pils_is_lifted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=f"60000 x 60000 pixels, at most {decode.MAX_PIXELS}"):
        decode_image(png_header(60_000, 60_000), "bomb.png")


# --- Masks ---------------------------------------------------------------------------------


def mask(data: bytes) -> np.ndarray:
    image = decode_mask(data, "m")
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


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_masks(format: str):
    assert mask(encode(grey(VALUES, np.uint16), format)).tolist() == VALUES
    with pytest.raises(ImageError, match="Cannot decode m: it has the value 300, labels are 0 to"):
        decode_mask(encode(grey([[3, 300]], np.uint16), format), "m")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK"])
def test_colour_masks_are_errors(mode: str):
    data = encode(noise().convert(mode), "TIFF")
    with pytest.raises(ImageError, match=f"Cannot decode m: its mode is {mode}, a mask has one"):
        decode_mask(data, "m")


def test_empty_mask_file():
    with pytest.raises(ImageError, match="Cannot decode m: the file is empty"):
        decode_mask(b"", "m")


def test_mask_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(grey([[1, 2], [3, 4], [5, 6]]), exif=exif)
    assert mask(data).tolist() == [[5, 3, 1], [6, 4, 2]]
