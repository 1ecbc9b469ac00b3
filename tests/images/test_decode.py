"""Every mode and every defect that image files come with."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import PHOTOGRAPHS, encode, grey, noise, photograph
from PIL import Image, ImageOps, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

import saev
from saev.config import ImgFolder
from saev.config.images import MAX_PIXELS
from saev.errors import ImageError
from saev.images import open_dataset
from saev.images.decode import Limits, decode_image


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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("seed", range(8))
def test_what_pil_refuses_is_refused(format: str, seed: int):
    """Half a picture never passes for a whole one: here a stretch of the file is zeros."""
    rng = np.random.default_rng(seed)
    data = bytearray(encode(photograph().resize((200, 100)), format))
    start = int(rng.integers(40, len(data)))
    data[start : start + int(rng.integers(20, len(data)))] = bytes(1)
    data = data.ljust(start + 400, b"\0")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:
        with pytest.raises(ImageError, match=r"^Cannot decode x: "):
            decode_image(bytes(data), "x")
    else:
        assert decode_image(bytes(data), "x").size == image.size


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
    with pytest.raises(ImageError, match=r"Cannot decode bomb\.png: .*pixels"):
        decode_image(png_header(60_000, 60_000), "bomb.png")


def test_our_own_limit_holds_where_pils_is_lifted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=f"60000 x 60000 pixels, at most {MAX_PIXELS}"):
        decode_image(png_header(60_000, 60_000), "bomb.png")


# --- Files that are larger than they need be --------------------------------------------------


def test_there_is_one_decoder():
    """Its limits and formats hold everywhere only if nothing else opens images."""
    product = Path(saev.__file__).parent
    opening = [p for p in product.rglob("*.py") if "Image.open(" in p.read_text()]
    # Notebooks show what users would write.
    assert [p.name for p in opening if p.parent.name != "notebooks"] == ["decode.py"]


def long_texts(profile: bool = False) -> bytes:
    """A PNG with 3 MB of compressed text, as image generators and editors write."""
    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    options = {"icc_profile": b"z" * 3_000_000} if profile else {}
    return encode(noise(), pnginfo=info, **options)


@pytest.mark.parametrize("profile", [False, True])
def test_texts_and_profiles_of_any_length_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, profile: bool
):
    data = long_texts(profile)
    found = rgb(data)
    np.testing.assert_array_equal(found, np.asarray(noise()).astype(int))
    # PIL itself refuses such files, and with a larger limit reads the same.
    with pytest.raises(ValueError, match="MAX_TEXT"):
        Image.open(io.BytesIO(data)).load()
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 26)
    with Image.open(io.BytesIO(data)) as expected:
        np.testing.assert_array_equal(found, np.asarray(expected).astype(int))


def test_texts_behind_the_pixels_are_passed_over():
    """PIL meets them at another moment: when it has unpacked the pixels."""
    data = encode(noise())
    end = len(data) - 12
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    np.testing.assert_array_equal(
        rgb(data[:end] + chunk + data[end:]), np.asarray(noise()).astype(int)
    )


def test_exif_among_long_texts_still_turns_the_image():
    """ImageMagick keeps EXIF in a text."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    profile = f"\nexif\n{len(raw):8d}\n{raw.hex()}\n"
    info = PngInfo()
    info.add_text("Raw profile type exif", profile, zip=True)
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    found = rgb(encode(noise(8, 12), pnginfo=info))
    expected = noise(8, 12).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(found, np.asarray(expected).astype(int))


def test_long_texts_need_no_memory():
    """A bomb in a text is never unpacked: 100 MB in 100 kB."""
    data = encode(noise())
    packer = zlib.compressobj()
    body = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    text = b"zTXt" + b"Comment\0\0" + body
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    tracemalloc.start()
    try:
        rgb(data[:33] + chunk + data[33:])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_damaged_png_with_long_texts_is_an_image_error():
    data = long_texts()
    with pytest.raises(ImageError, match=r"^Cannot decode x: "):
        decode_image(data[: len(data) - 80], "x")


# --- The limit of pixels ------------------------------------------------------------------------


def test_the_limit_of_pixels_is_the_configs(tmp_path: Path):
    encoded = encode(Image.new("1", (400, 300)))
    (tmp_path / "a.png").write_bytes(encoded)
    assert decode_image(encoded, "x", Limits(max_pixels=120_000)).size == (400, 300)
    assert open_dataset(ImgFolder(root=str(tmp_path), max_pixels=120_000)).load(0).height == 300
    dataset = open_dataset(ImgFolder(root=str(tmp_path), max_pixels=119_999))
    with pytest.raises(ImageError, match=r"400 x 300 pixels, at most 119999 .*max-pixels 120000"):
        dataset.load(0)


def test_a_raised_limit_lets_through_what_pil_refuses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # instead of an image of 180 megapixels
    encoded = encode(Image.new("1", (400, 300)))
    with pytest.raises(ImageError, match="exceeds limit of 100000 pixels"):
        decode_image(encoded, "x", Limits(max_pixels=100_000))
    assert decode_image(encoded, "x", Limits(max_pixels=120_000)).size == (400, 300)


def test_a_file_far_larger_than_its_pixels_can_be_is_not_read(tmp_path: Path):
    with (tmp_path / "a.tif").open("wb") as file:
        file.truncate(200 << 20)
    dataset = open_dataset(ImgFolder(root=str(tmp_path), max_pixels=1_000_000))
    with pytest.raises(ImageError, match=r"a\.tif: it has 209715200 bytes, at most 75108864 are"):
        dataset.load(0)
