"""iter_examples: order, look-ahead, errors, and that no thread outlives it."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import PHOTOGRAPHS, encode, grey, noise, photograph, write
from PIL import Image

from saev import storage
from saev.config import FakeImg, FakeImgSeg, ImgFolder, ImgSegFolder
from saev.errors import ConfigError, ImageError, StorageError
from saev.images import (
    Decoded,
    ImageDataset,
    ImageSpec,
    Unreadable,
    iter_examples,
    open_dataset,
    token_labels,
)
from saev.images.datasets import ExampleInfo

SPEC = ImageSpec(image_size=(32, 32), resize=36)


def decoding_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("saev-decode")]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert decoding_threads() == []


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    """Real photographs, one class each."""
    for name in PHOTOGRAPHS:
        for i, size in enumerate([(90, 60), (61, 97)]):
            write(str(tmp_path / name[:-4] / f"{i}.jpg"), photograph(name).resize(size))
    return str(tmp_path)


class Counting(ImageDataset):
    """Counts what is being loaded; some examples are slow, so that threads overtake each other."""

    def __init__(self, n: int, seconds: float = 0.0):
        self._n, self._seconds = n, seconds
        self._lock = threading.Lock()
        self.started: list[int] = []

    def __len__(self) -> int:
        return self._n

    @property
    def digest(self) -> str:
        return ""

    def example(self, index: int) -> ExampleInfo:
        return ExampleInfo(f"counting/{index}", "", -1)

    def load(self, index: int) -> Image.Image:
        with self._lock:
            self.started.append(index)
        time.sleep(self._seconds * (index % 3))
        if index >= 1000:
            raise ImageError(f"Cannot decode counting/{index}")
        return noise(40, 40, seed=index)


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_order_and_values_do_not_depend_on_threads(photographs: str, n_workers: int):
    dataset = open_dataset(ImgFolder(root=photographs))
    order = [3, 0, 9, 9, 5, 1, 2]
    found = list(iter_examples(dataset, order, SPEC, n_workers=n_workers))
    assert [record.index for record in found] == order
    for record in found:
        image = dataset.load(record.index)
        assert isinstance(record, Decoded)
        assert torch.equal(record.pixels, SPEC.apply(image))
        assert (record.height, record.width) == (image.height, image.width)
        assert record.labels is None


def test_slow_examples_are_waited_for():
    order = list(range(30))
    found = iter_examples(Counting(30, seconds=0.004), iter(order), SPEC, n_workers=4)
    assert [record.index for record in found] == order


@pytest.mark.parametrize("look_ahead", [1, 3, 7])
def test_look_ahead_is_bounded(look_ahead: int):
    dataset = Counting(40)
    with contextlib.closing(
        iter_examples(dataset, range(40), SPEC, n_workers=2, look_ahead=look_ahead)
    ) as records:
        assert dataset.started == []  # nothing starts by itself
        for n_taken, record in enumerate(records, start=1):
            assert record.index == n_taken - 1
            time.sleep(0.002)
            assert len(dataset.started) <= n_taken - 1 + look_ahead


@pytest.mark.parametrize("pixel_agg", ["majority", "prefer-fg"])
def test_token_labels_are_those_of_the_crop(pixel_agg: str):
    cfg = FakeImgSeg(n_examples=6, image_size=50, pixel_agg=pixel_agg, bg_label=3)
    dataset = open_dataset(cfg)
    for record in iter_examples(dataset, range(6), SPEC, grid=(4, 4), n_workers=2):
        mask = SPEC.crop_mask(dataset.load_mask(record.index))
        assert record.labels.tolist() == token_labels(mask, (4, 4), pixel_agg, 3).tolist()
        assert len(set(record.labels.tolist())) > 1


def test_padding_is_background():
    dataset = open_dataset(FakeImgSeg(n_examples=1, image_size=8, bg_label=9))
    spec = ImageSpec(image_size=(32, 32), resize=8)
    (record,) = iter_examples(dataset, [0], spec, grid=(4, 4))
    labels = record.labels.reshape(4, 4)
    assert (labels[[0, 3]] == 9).all()
    assert (labels[:, [0, 3]] == 9).all()


def test_masks_are_read_only_for_a_grid(tmp_path: Path):
    write(str(tmp_path / "images/training/a.png"), noise())
    write(str(tmp_path / "annotations/training/a.png"), b"GARBAGE")
    dataset = open_dataset(ImgSegFolder(root=str(tmp_path)))
    (record,) = iter_examples(dataset, [0], SPEC)
    assert record.labels is None
    with pytest.raises(ImageError, match=r"annotations/training/a\.png"):
        list(iter_examples(dataset, [0], SPEC, grid=(4, 4)))
    (skipped,) = iter_examples(dataset, [0], SPEC, grid=(4, 4), skip_unreadable=True)
    assert isinstance(skipped, Unreadable)
    assert skipped.url.endswith("images/training/a.png")
    assert "annotations/training/a.png" in skipped.reason


def test_dataset_without_masks_ignores_the_grid():
    (record,) = iter_examples(open_dataset(FakeImg()), [0], SPEC, grid=(4, 4))
    assert record.labels is None


def test_unreadable_images_are_errors_in_order_or_are_left_out(photographs: str):
    bad = {
        "chelsea/0.jpg": b"",
        "coffee/1.jpg": b"GARBAGE",
        "rocket/0.jpg": encode(photograph().resize((200, 100)), "JPEG")[:900],
        "rocket/1.jpg": encode(Image.new("L", (1, 30_000))),
    }
    spec = ImageSpec(image_size=(224, 224), resize=224)
    for key, data in bad.items():
        write(storage.join(photographs, key), data)
    dataset = open_dataset(ImgFolder(root=photographs))
    records = iter_examples(dataset, range(10), spec, n_workers=3)
    assert [next(records).index for _ in range(2)] == [0, 1]
    with pytest.raises(ImageError, match=r"chelsea/0\.jpg: the file is empty"):
        next(records)
    assert decoding_threads() == []

    records = list(iter_examples(dataset, range(10), spec, n_workers=3, skip_unreadable=True))
    assert [record.index for record in records] == list(range(10))
    skipped = [record for record in records if isinstance(record, Unreadable)]
    assert [record.url for record in skipped] == [storage.join(photographs, key) for key in bad]
    for record, reason in zip(
        skipped, ["is empty", "not an image", "truncated", "too narrow"], strict=True
    ):
        assert record.url in record.reason
        assert reason in record.reason


def test_an_outage_of_the_storage_is_never_skipped(photographs: str):
    dataset = open_dataset(ImgFolder(root=photographs))
    storage.delete(dataset.example(4).url)
    with pytest.raises(StorageError, match="does not exist"):
        list(iter_examples(dataset, range(10), SPEC, skip_unreadable=True))


def test_early_break_leaves_no_thread_and_starts_nothing_more():
    dataset = Counting(1000, seconds=0.01)
    for record in iter_examples(dataset, range(1000), SPEC, n_workers=3, look_ahead=50):
        if record.index == 5:
            break
    assert decoding_threads() == []
    started = len(dataset.started)
    assert started < 100
    time.sleep(0.05)
    assert len(dataset.started) == started


def test_closing_is_prompt_in_the_middle_of_a_long_queue():
    dataset = Counting(1000, seconds=0.02)
    records = iter_examples(dataset, range(1000), SPEC, n_workers=2, look_ahead=500)
    with contextlib.closing(records):
        assert next(records).index == 0
        begun = time.monotonic()
    assert time.monotonic() - begun < 1
    assert decoding_threads() == []
    with pytest.raises(StopIteration):
        next(records)


def test_an_error_in_the_loop_leaves_no_thread():
    def consume() -> None:
        with contextlib.closing(iter_examples(Counting(100), range(100), SPEC)) as records:
            for record in records:
                if record.index == 3:
                    raise RuntimeError("out of memory on the GPU")

    with pytest.raises(RuntimeError):
        consume()
    assert decoding_threads() == []


def test_an_error_in_the_indices_leaves_no_thread():
    def indices() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(iter_examples(Counting(1), indices(), SPEC))
    assert decoding_threads() == []


def test_no_indices():
    assert list(iter_examples(Counting(3), [], SPEC)) == []


@pytest.mark.parametrize("bad", [{"n_workers": -1}, {"look_ahead": -2}])
def test_negative_numbers(bad: dict[str, int]):
    with pytest.raises(ConfigError, match="cannot be negative"):
        iter_examples(Counting(1), [0], SPEC, **bad)


def test_grid_that_does_not_divide_the_input():
    dataset = open_dataset(FakeImgSeg(n_examples=2))
    with pytest.raises(ConfigError, match="32 x 32 pixels cannot be cut into 5 x 5 tokens"):
        list(iter_examples(dataset, range(2), SPEC, grid=(5, 5), skip_unreadable=True))


def test_the_whole_way_on_every_storage(root: str):
    """Photograph, mask and label from a bucket to a model's input."""
    values = np.zeros((60, 90), np.uint8)
    values[:, 45:] = 200
    for name in PHOTOGRAPHS[:2]:
        picture = photograph(name).resize((90, 60))
        write(storage.join(root, "images/training", name[:-4] + ".jpg"), picture)
        write(storage.join(root, "annotations/training", name[:-4] + ".png"), grey(values))
    dataset = open_dataset(ImgSegFolder(root=root))
    for record in iter_examples(dataset, range(2), SPEC, grid=(2, 2), n_workers=2):
        assert record.pixels.shape == (3, 32, 32)
        assert (record.height, record.width) == (60, 90)
        assert record.labels.tolist() == [0, 200, 0, 200]
