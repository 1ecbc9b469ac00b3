"""Generated datasets: the same everywhere, with something to see in them."""

import hashlib

import numpy as np
import pytest

from saev.config import FakeImg, FakeImgSeg
from saev.errors import ConfigError
from saev.images import open_dataset


def test_pixels_are_pinned():
    """The same on every machine and version: shards made from them are compared by hash."""
    dataset = open_dataset(FakeImg(n_examples=3, image_size=32, seed=7))
    pixels = b"".join(dataset.load(i).tobytes() for i in range(3))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "50c2eee46d0868ff"


def test_examples():
    dataset = open_dataset(FakeImg(n_examples=5, n_classes=3, image_size=20))
    assert len(dataset) == 5
    assert dataset.classes == ("class0", "class1", "class2")
    assert [dataset.example(i).target for i in range(5)] == [0, 1, 2, 0, 1]
    assert dataset.example(4) == ("fake-img/4", "class1", 1)
    assert not dataset.has_masks
    assert dataset.load_mask(0) is None
    for i in range(5):
        image = dataset.load(i)
        assert (image.mode, image.size) == ("RGB", (20, 20))
        assert np.asarray(image).std() > 10
    assert dataset.load(0).tobytes() != dataset.load(1).tobytes()
    with pytest.raises(IndexError):
        dataset.load(5)


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_examples": 6}, {"image_size": 21}])
def test_digest_is_that_of_the_config(change: dict[str, int]):
    base = {"n_examples": 5, "image_size": 20}
    digest = open_dataset(FakeImg(**base)).digest
    assert digest == open_dataset(FakeImg(**base)).digest
    assert digest != open_dataset(FakeImg(**(base | change))).digest
    assert len(digest) == 64


def test_seed_changes_pixels_but_not_with_the_number_of_examples():
    one, other = (open_dataset(FakeImg(seed=s)).load(3).tobytes() for s in (0, 1))
    assert one != other
    assert one == open_dataset(FakeImg(seed=0, n_examples=1000)).load(3).tobytes()


@pytest.mark.parametrize("bg_label", [0, 2, 255])
def test_masks_hold_the_shapes_of_the_image(bg_label: int):
    cfg = FakeImgSeg(n_examples=12, n_classes=3, image_size=48, bg_label=bg_label)
    dataset = open_dataset(cfg)
    assert dataset.has_masks
    assert dataset.bg_label == bg_label
    value_of_class = [v for v in range(256) if v != bg_label][:3]
    seen = set()
    colours: dict[int, list[np.ndarray]] = {}
    for i in range(12):
        image, mask = dataset.load_pair(i)
        values, pixels = np.asarray(mask), np.asarray(image)
        assert value_of_class[dataset.example(i).target] in values
        seen |= set(values.ravel().tolist())
        for value in set(values.ravel().tolist()) - {bg_label}:
            colours.setdefault(value, []).append(pixels[values == value].mean(axis=0))
    assert seen == {bg_label, *value_of_class}
    for means in colours.values():  # one class, one colour, in all images
        assert np.ptp(np.array(means), axis=0).max() < 20


def test_image_of_one_pixel():
    assert open_dataset(FakeImgSeg(image_size=1)).load_pair(0)[1].size == (1, 1)


def test_too_many_classes_for_a_mask():
    with pytest.raises(ConfigError, match="n_classes is 256, but masks hold at most 255"):
        open_dataset(FakeImgSeg(n_classes=256))
    assert len(open_dataset(FakeImg(n_classes=256)).classes) == 256
