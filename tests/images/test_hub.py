"""Hugging Face datasets: tiny ones that the library itself made and saved on disk."""

import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet
import pytest
from pictures import encode, grey, noise, write
from PIL import Image

from saev import storage
from saev.config import Cifar10, Imagenet
from saev.errors import ConfigError, ImageError, StorageError
from saev.images import open_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's cache out of the home folder, and its bars off the screen."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def make(n: int = 5, image: str = "image", label: str = "label") -> datasets.Dataset:
    """Rows with classes in an order that is not the alphabet's."""
    features = datasets.Features(
        {
            image: datasets.Image(),
            label: datasets.ClassLabel(names=["zebra", "ant", "mole"]),
            "note": datasets.Value("string"),
        }
    )
    cells = [{"bytes": encode(noise(6, 7, seed=i)), "path": f"{i}.png"} for i in range(n)]
    rows = {image: cells, label: [i % 3 for i in range(n)], "note": ["x"] * n}
    return datasets.Dataset.from_dict(rows, features=features)


def check(dataset: object, n: int = 5) -> None:
    assert len(dataset) == n
    assert dataset.classes == ("zebra", "ant", "mole")
    for i in range(n):
        assert dataset.example(i)[1:] == (dataset.classes[i % 3], i % 3)
        assert dataset.load(i).tobytes() == noise(6, 7, seed=i).tobytes()


def test_parquet_folder(tmp_path: Path):
    (tmp_path / "ds").mkdir()
    make().to_parquet(tmp_path / "ds" / "train-00000.parquet")
    make(3).to_parquet(tmp_path / "ds" / "test-00000.parquet")
    check(open_dataset(Imagenet(name=str(tmp_path / "ds"))))
    check(open_dataset(Imagenet(name=str(tmp_path / "ds"), split="test")), n=3)
    check(open_dataset(Imagenet(name=str(tmp_path / "ds"), split="train[:2]")), n=2)


def test_saved_to_disk(root: str):
    url = storage.join(root, "one")
    make().save_to_disk(url)
    dataset = open_dataset(Imagenet(name=url))
    check(dataset)
    assert dataset.example(2).url == f"{url}#train/2"


def test_saved_to_disk_with_splits(tmp_path: Path):
    name = str(tmp_path / "both")
    datasets.DatasetDict({"train": make(5), "test": make(3)}).save_to_disk(name)
    check(open_dataset(Cifar10(name=name, split="test")), n=3)
    with pytest.raises(ConfigError, match=r"no split 'val' in .*; it has train, test\. Set"):
        open_dataset(Cifar10(name=name, split="val"))


def test_cifar_names_its_columns_otherwise(tmp_path: Path):
    make(image="img", label="fine_label").save_to_disk(tmp_path / "cifar")
    check(open_dataset(Cifar10(name=str(tmp_path / "cifar"))))


def test_image_folder(tmp_path: Path):
    for key in ("train/cat/1.png", "train/dog/2.png", "train/dog/3.jpg"):
        write(str(tmp_path / "ds" / key), noise(9, 9))
    dataset = open_dataset(Imagenet(name=str(tmp_path / "ds")))
    assert [dataset.example(i)[1:] for i in range(3)] == [("cat", 0), ("dog", 1), ("dog", 1)]
    assert dataset.load(2).size == (9, 9)


def test_bytes_go_to_our_own_decoder(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    cells = [encode(noise(6, 8), "JPEG", exif=exif), encode(grey([[0, 65535]], np.uint16)), b"NO"]
    rows = {"image": [{"bytes": cell, "path": None} for cell in cells]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "ds")
    dataset = open_dataset(Imagenet(name=str(tmp_path / "ds")))
    assert dataset.load(0).size == (6, 8)
    assert np.asarray(dataset.load(1))[0, :, 0].tolist() == [0, 255]
    with pytest.raises(ImageError, match=r"Cannot decode .*ds#train/2: it is not an image"):
        dataset.load(2)
    assert dataset.example(0)[1:] == ("", -1)  # no labels


@pytest.mark.parametrize(
    ("labels", "names", "targets"),
    [
        (["b", "a", None], ("a", "b"), [1, 0, -1]),
        ([10, 9, None], ("9", "10"), [1, 0, -1]),
    ],
)
def test_labels_without_class_names(
    tmp_path: Path, labels: list, names: tuple[str, ...], targets: list[int]
):
    rows = {"image": [{"bytes": encode(noise()), "path": None}] * 3, "label": labels}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string" if "b" in labels else "int64")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "ds")
    dataset = open_dataset(Imagenet(name=str(tmp_path / "ds")))
    assert dataset.classes == names
    assert [dataset.example(i).target for i in range(3)] == targets


def test_digest_is_of_the_rows_not_of_the_copy(tmp_path: Path):
    (tmp_path / "a").mkdir()
    make().to_parquet(tmp_path / "a" / "train.parquet")
    make().save_to_disk(tmp_path / "b", num_shards=2)
    one, other = (open_dataset(Imagenet(name=str(tmp_path / d))).digest for d in "ab")
    assert one == other
    assert len(one) == 64
    fewer = make().select(range(4))
    fewer.save_to_disk(tmp_path / "c")
    relabelled = make().map(lambda row: {"label": (row["label"] + 1) % 3})
    relabelled.save_to_disk(tmp_path / "d")
    digests = {open_dataset(Imagenet(name=str(tmp_path / d))).digest for d in "acd"}
    assert len(digests) == 3


def test_digest_of_an_image_folder_covers_sizes(tmp_path: Path):
    write(str(tmp_path / "ds" / "train" / "a" / "1.png"), noise(9, 9))
    write(str(tmp_path / "ds" / "train" / "b" / "2.png"), noise(9, 9))
    before = open_dataset(Imagenet(name=str(tmp_path / "ds"))).digest
    assert before == open_dataset(Imagenet(name=str(tmp_path / "ds"))).digest
    write(str(tmp_path / "ds" / "train" / "b" / "2.png"), noise(19, 19))
    assert before != open_dataset(Imagenet(name=str(tmp_path / "ds"))).digest


def test_no_image_column(tmp_path: Path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "ds")
    with pytest.raises(ConfigError, match=r"needs one column of images .*; it has none among text"):
        open_dataset(Imagenet(name=str(tmp_path / "ds")))


def test_no_rows(tmp_path: Path):
    (tmp_path / "ds").mkdir()
    make(0).to_parquet(tmp_path / "ds" / "train.parquet")
    with pytest.raises(ConfigError, match=r"ds, split 'train': .*corresponds to no data"):
        open_dataset(Imagenet(name=str(tmp_path / "ds")))


def test_unknown_split_of_parquet(tmp_path: Path):
    (tmp_path / "ds").mkdir()
    make().to_parquet(tmp_path / "ds" / "train.parquet")
    with pytest.raises(ConfigError, match=r"Cannot load dataset .*split 'nope': Unknown split"):
        open_dataset(Imagenet(name=str(tmp_path / "ds"), split="nope"))


def test_damaged_parquet(tmp_path: Path):
    (tmp_path / "ds").mkdir()
    make().to_parquet(tmp_path / "ds" / "train.parquet")
    whole = (tmp_path / "ds" / "train.parquet").read_bytes()
    (tmp_path / "ds" / "train.parquet").write_bytes(whole[:200])
    with pytest.raises(pyarrow.ArrowInvalid):
        pyarrow.parquet.read_table(tmp_path / "ds" / "train.parquet")
    with pytest.raises(
        (ConfigError, StorageError), match=r"Cannot load dataset .*ds, split 'train'"
    ):
        open_dataset(Imagenet(name=str(tmp_path / "ds")))


def test_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    """Offline, so that the test needs no network and asks no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"^Cannot load dataset some-org/some-dataset, split 'train': .*accept its terms\.$"
    with pytest.raises(StorageError, match=message):
        open_dataset(Cifar10(name="some-org/some-dataset"))


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds if it is missing
    with pytest.raises(ConfigError, match=r"data:cifar10 needs .*pip install 'saevit\[hf\]'"):
        open_dataset(Cifar10())


def test_a_folder_whose_name_the_library_takes_for_a_chain_is_named(tmp_path: Path):
    place = tmp_path / "a::b"
    make().save_to_disk(str(tmp_path / "plain"))
    (tmp_path / "plain").rename(place)
    with pytest.raises(ConfigError, match="treats :: in a path as a chain of URLs"):
        open_dataset(Imagenet(name=str(place)))
