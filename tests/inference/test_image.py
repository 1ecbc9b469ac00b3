"""Any image is encoded as `saev inference` encodes it when it is an image of the dataset."""

import typing as tp
from pathlib import Path

import numpy as np
import pytest
from dinov2 import dinov2_url  # noqa: F401 - a fixture
from own_images import (
    PHOTO,
    Recorded,
    Tiny,
    dense_of,
    encoded,
    make_recorded,
    make_run,
    noise,
    record,
    write_photos,
)
from PIL import Image

from saev import inference, storage
from saev.config import DataConfig, InferenceConfig
from saev.errors import ConfigError, ImageError, ModelError, SaevError
from saev.images.decode import Limits
from saev.inference.image import ImageReader
from saev.inference.results import Results


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return make_recorded(tmp_path_factory.mktemp("own"))


def measured(run: str, shards: str, example: int, d_sae: int, tokens: str = "content") -> tp.Any:
    """What `saev inference` stored of an example: dense values [1 + patches, d_sae], and each
    latent's largest value of all."""
    data = DataConfig(shards=shards, tokens=tp.cast(tp.Any, tokens))
    results = Results.open(inference.run(InferenceConfig(run=run, data=data, device="cpu")))
    table = results.image_tokens(example)
    latent, patch, value = (table[name].to_numpy() for name in ("latent", "patch", "value"))
    dense = np.zeros((1 + results.content_tokens, d_sae))
    dense[patch + 1, latent] = value
    return dense, results.max_values


def assert_equal_but_for_ties(found: np.ndarray, wanted: np.ndarray, largest: np.ndarray) -> None:
    """Values differ by at most a thousandth of the latent's maximum. A latent that is active on one
    side only must tie with the weakest active latent of the other side."""
    tolerance = 1e-3 * largest + 1e-6
    both = (found != 0) & (wanted != 0)
    assert (np.abs(found - wanted) <= tolerance)[both].all()
    assert both.sum() >= 0.99 * max((found != 0).sum(), (wanted != 0).sum())
    for here, there in ((found, wanted), (wanted, found)):
        for row, latent in np.argwhere((here != 0) & (there == 0)):
            weakest = there[row][there[row] != 0].min()
            assert abs(here[row, latent] - weakest) <= tolerance.max()


def test_dinov2_gives_the_codes_of_inference(tmp_path: Path, dinov2_url: str) -> None:  # noqa: F811
    photos = write_photos(tmp_path / "photos")
    ckpt = f"vits14@{dinov2_url}"
    shards = record(tmp_path, photos, family="dinov2", ckpt=ckpt, image_size=112, layers=(5,))
    run = make_run(str(tmp_path / "run"), shards, 5, d_sae=768, k=32)
    reader = ImageReader.open(run)
    for example, url in enumerate(shards.examples()["url"].to_pylist()):
        codes = reader.read(url)
        assert codes.shape == (8, 8)
        dense, largest = measured(run, shards.url, example, 768)
        assert_equal_but_for_ties(dense_of(codes), dense, largest)


@pytest.mark.parametrize("tokens", ["content", "special", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tokens_and_precision_are_those_that_were_recorded(
    recorded: Recorded, tmp_path: Path, tokens: str, dtype: str
) -> None:
    shards = record(tmp_path, recorded.photos, dtype=dtype, amp=dtype == "bfloat16")
    run = make_run(str(tmp_path / "run"), shards, 1, tokens=tokens)
    codes = ImageReader.open(run).read(f"{recorded.photos}/wide.webp")
    dense, largest = measured(run, shards.url, 3, 48, tokens)
    assert_equal_but_for_ties(dense_of(codes), dense, largest)
    assert codes.n_tokens == {"content": 16, "special": 1, "all": 17}[tokens]
    assert len(codes.values) == codes.n_tokens * 4


def test_path_bytes_and_picture_are_the_same_image(recorded: Recorded) -> None:
    reader = ImageReader.open(recorded.run)
    path = Path(recorded.photos) / PHOTO
    opened = Image.open(path)
    found = [reader.read(each) for each in (path, str(path), path.read_bytes(), opened)]
    for codes in found:
        assert codes.size == (240, 320)  # as it is displayed
        assert codes.crop.size == (64, 64)
        np.testing.assert_array_equal(dense_of(codes), dense_of(found[0]))
    assert opened.size == (320, 240)
    assert opened.getexif()[0x0112] == 6  # what the caller holds is not changed


def test_the_crop_is_what_the_model_sees(recorded: Recorded) -> None:
    codes = ImageReader.open(recorded.run).read(noise(640, 200, seed=4))
    # 200 pixels become 72, of 230 x 72 the middle 64 x 64 are taken: 22.75 … 202.25 of 640 above
    middle = noise(640, 200, seed=4).resize((230, 72), Image.Resampling.BICUBIC)
    assert codes.crop.tobytes() == middle.crop((83, 4, 147, 68)).tobytes()


def test_several_saes_share_one_pass(recorded: Recorded, tmp_path: Path) -> None:
    runs = [recorded.run, make_run(str(tmp_path / "r0"), recorded.shards, 0, tokens="all")]
    photo = f"{recorded.photos}/{PHOTO}"
    alone = [ImageReader.open(run).read(photo) for run in runs]
    reader = ImageReader.open(runs)
    reader.load()
    before = Tiny.n_passes
    together = reader.read_each(photo)
    assert Tiny.n_passes == before + 1
    assert reader.runs == tuple(runs)
    for one, other in zip(alone, together, strict=True):
        assert one.run == other.run
        np.testing.assert_allclose(dense_of(one), dense_of(other), atol=1e-6)
    with pytest.raises(ConfigError, match="2 SAEs: use read_each"):
        reader.read(photo)


def test_maps_and_peaks(recorded: Recorded) -> None:
    codes = ImageReader.open(recorded.run).read(f"{recorded.photos}/grey.png")
    dense = dense_of(codes)[1:]
    peaks = codes.peaks()
    firing = np.flatnonzero((dense != 0).any(0))
    assert sorted(peaks.latents) == list(firing)
    assert (np.diff(peaks.values) <= 0).all()
    for latent, value, mean, n in zip(*peaks, strict=True):
        assert value == np.float32(dense[:, latent].max())
        assert mean == pytest.approx(dense[:, latent].mean())
        assert n == (dense[:, latent] != 0).sum()
        np.testing.assert_array_equal(codes.map(latent).ravel(), dense[:, latent])
    some = codes.peaks([3, 7])
    assert sorted(some.latents) == list(np.flatnonzero((dense[[3, 7]] != 0).any(0)))
    for latent, mean in zip(some.latents, some.means, strict=True):
        assert mean == pytest.approx(dense[[3, 7], latent].mean())
    with pytest.raises(ConfigError, match="no latent 48: the SAE has 48"):
        codes.map(48)


def test_another_reader_shares_its_model(recorded: Recorded, tmp_path: Path) -> None:
    told: list[str] = []
    first = ImageReader.open(recorded.run)
    first.load()
    other = make_run(str(tmp_path / "r0"), recorded.shards, 0)
    second = ImageReader.open(other, like=first, tell=told.append)
    assert second.read(noise(80, 80)).run == other
    assert told == ["load the SAE r0", "run the model"]
    shards = record(tmp_path, recorded.photos, ckpt="3")
    third = ImageReader.open(make_run(str(tmp_path / "r1"), shards, 1), like=first)
    assert third.read(noise(80, 80)).source.ckpt == "3"


def test_results_say_what_is_repeated(recorded: Recorded, tmp_path: Path) -> None:
    """Of a layer and tokens that the SAE was not trained on, as it was measured."""
    run = make_run(str(tmp_path / "run"), recorded.shards, 1)
    data = DataConfig(shards=recorded.shards.url, layer=0, tokens="all")
    url = inference.run(InferenceConfig(run=run, data=data, device="cpu"))
    results = Results.open(url)
    codes = ImageReader.open(run, results=results).read(f"{recorded.photos}/grey.png")
    assert (codes.source.layer, codes.source.tokens) == (0, "all")
    table = results.image_tokens(0)
    assert codes.latents.tolist() == table["latent"].to_pylist()
    assert codes.patches.tolist() == table["patch"].to_pylist()


def test_neither_shards_nor_images_are_needed(recorded: Recorded, tmp_path: Path) -> None:
    shards = record(tmp_path, recorded.photos, ckpt="5")
    run = make_run(str(tmp_path / "run"), shards, 1)
    before = ImageReader.open(run).read(noise(80, 80))
    storage.delete(shards.url, recursive=True)
    np.testing.assert_array_equal(
        dense_of(ImageReader.open(run).read(noise(80, 80))), dense_of(before)
    )


def test_unknown_preprocessing_is_not_guessed(recorded: Recorded, tmp_path: Path) -> None:
    """A run of version 0.1.0 recorded it in its shards only."""
    run = edited(recorded, tmp_path / "run", image_spec=None, image_size=None)
    with pytest.raises(ConfigError, match=r"how images were cropped .* --shards URL"):
        ImageReader.open(run)
    codes = ImageReader.open(run, shards=recorded.shards.url).read(noise(80, 80))
    expected = ImageReader.open(recorded.run).read(noise(80, 80))
    np.testing.assert_array_equal(dense_of(codes), dense_of(expected))


def test_an_imported_sae_needs_shards(recorded: Recorded, tmp_path: Path) -> None:
    """Its checkpoint alone says nothing about activations."""
    from saev.nn import load_sae

    sae = load_sae(recorded.run)
    sae.save(str(tmp_path / "sae"))
    with pytest.raises(ConfigError, match=r"does not say which activations .* --shards URL"):
        ImageReader.open(str(tmp_path / "sae"))
    with pytest.raises(ConfigError, match="does not say which layer"):
        ImageReader.open(str(tmp_path / "sae"), shards=recorded.shards.url)
    codes = ImageReader.open(str(tmp_path / "sae"), shards=recorded.shards.url, layer=1)
    photo = f"{recorded.photos}/{PHOTO}"
    np.testing.assert_array_equal(
        dense_of(codes.read(photo)), dense_of(ImageReader.open(recorded.run).read(photo))
    )


def test_a_moved_model_is_named(recorded: Recorded, tmp_path: Path) -> None:
    """Other weights are refused, wherever they come from."""
    reader = ImageReader.open(recorded.run, ckpt="1")
    with pytest.raises(ModelError, match=r"not the one that .*weights sha256.* there, .* here"):
        reader.load()
    shards = record(tmp_path, recorded.photos, ckpt="7")
    with pytest.raises(ConfigError, match="trained on other activations"):
        ImageReader.open(recorded.run, shards=shards.url)
    allowed = ImageReader.open(recorded.run, shards=shards.url, allow_other_model=True)
    assert allowed.read(noise(80, 80)).source.ckpt == "7"
    run = make_run(str(tmp_path / "run"), shards, 1)
    with pytest.raises(ConfigError, match="SAEs of different models"):
        ImageReader.open([recorded.run, run])


def edited(recorded: Recorded, to: Path, **changes: tp.Any) -> str:
    """The run, whose checkpoint names another source."""
    from saev.nn import load_sae

    sae = load_sae(recorded.run)
    sae.save(str(to / "checkpoint"), {**sae.metadata, **changes})
    config = storage.read_json(f"{recorded.run}/config.json")
    storage.write_json(str(to / "config.json"), config)
    return str(to)


@pytest.mark.parametrize(
    ("family", "ckpt", "message"),
    [
        (
            "timm",
            "test_vit@/nowhere/w.safetensors",
            r"needs its model.*nowhere.*--ckpt test_vit@U",
        ),
        ("timm", "test_vit.r160_in1k", r"needs its model.*Cannot get the weights.*@FILE"),
        ("timm", "hf-hub:somebody/model", r"only if you name it yourself.*--ckpt CKPT"),
        ("timm", "test_vit@s3://other/w.safetensors", r"not in the same bucket.*--ckpt CKPT"),
        ("clip", "local-dir:/proc/self", r"no plain folder.*--ckpt CKPT"),
        ("nobody", "0", r"needs its model.*Unknown model family 'nobody'"),
    ],
)
def test_one_sentence_says_what_is_missing(
    recorded: Recorded, tmp_path: Path, family: str, ckpt: str, message: str
) -> None:
    run = edited(recorded, tmp_path / "run", family=family, ckpt=ckpt, ckpt_checksum=None)
    reader = ImageReader.open(run)
    with pytest.raises(SaevError, match=message) as caught:
        reader.read(noise(80, 80))
    assert isinstance(caught.value, ConfigError | ModelError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"Cannot decode x\.jpg: the file is empty \(0 bytes\)\. Take another file"),
        (b"%PDF-1.7 ...", r"Cannot decode x\.jpg: it is not an image of a format that is read"),
        (encoded(noise(64, 64))[:-200], r"Cannot decode x\.jpg: .*truncated.* Take another file"),
        (encoded(noise(400, 400)), r"400 x 400 pixels, at most 100000 are decoded\. Take another"),
        (encoded(Image.new("RGB", (60000, 1))), r"Cannot use x\.jpg: .*too narrow"),
    ],
    ids=["empty", "no image", "damaged", "too many pixels", "too narrow"],
)
def test_a_bad_image_is_one_error(recorded: Recorded, data: bytes, message: str) -> None:
    reader = ImageReader.open(recorded.run, limits=Limits(max_pixels=100_000, flag=""))
    with pytest.raises(ImageError, match=message):
        reader.read(data, "x.jpg")


def test_a_file_that_is_too_long_is_not_read(recorded: Recorded, tmp_path: Path) -> None:
    place = tmp_path / "long.jpg"
    with place.open("wb") as file:
        file.truncate(65 << 20)
    reader = ImageReader.open(recorded.run, limits=Limits(max_pixels=1000, flag=""))
    with pytest.raises(ImageError, match="68157440 bytes, at most 67116864 are read"):
        reader.read(place)
    with pytest.raises(SaevError, match=r"gone\.jpg"):
        reader.read(tmp_path / "gone.jpg")


def test_it_tells_what_takes_time(recorded: Recorded) -> None:
    told: list[str] = []
    reader = ImageReader.open(recorded.run, tell=told.append)
    assert told == ["load the SAE r1"]
    reader.read(noise(80, 80))
    reader.read(noise(80, 80))
    again = ["run the model"]
    assert told == ["load the SAE r1", "load the model image-test 0", *again, *again]
