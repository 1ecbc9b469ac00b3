"""Where the pictures come from."""

import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saev import cores, inference, storage, visuals
from saev.config import (
    DataConfig,
    FakeImg,
    ImageData,
    Imagenet,
    ImgFolder,
    ImgSegFolder,
    InferenceConfig,
    ShardsConfig,
)
from saev.errors import ConfigError, ImageError
from saev.images.budget import PIXELS_PER_WORKER
from saev.shards import Shards, extract
from saev.visuals.source import Source, read_class_names, recorded_data
from saev.visuals.stored import Pictures
from visuals.chain import Chain, png, write_photos, write_png


def published(root: Path, d_model: int, n: int = 8) -> str:
    """A folder of protocol 2.1 as the published saev leaves it: 4 x 4 patches, labelled."""
    rng = np.random.default_rng(1)
    metadata = {
        "family": "clip", "ckpt": "ViT-B-16/openai", "layers": [1], "cls_token": True,
        "content_tokens_per_example": 16, "d_model": d_model, "n_examples": n,
        "max_tokens_per_shard": 1000, "data": "gASVCwAAAAAAAACMB2Rhbmdlcpc=", "dataset": "/gone",
        "pixel_agg": "majority", "dtype": "float32", "protocol": "2.1",
    }  # fmt: skip
    root.mkdir(parents=True)
    (root / "metadata.json").write_text(json.dumps(metadata))
    (root / "shards.json").write_text(json.dumps([{"name": "acts000000.bin", "n_examples": n}]))
    rng.standard_normal((n, 1, 17, d_model)).astype("<f4").tofile(root / "acts000000.bin")
    rng.integers(0, 3, (n, 16)).astype(np.uint8).tofile(root / "labels.bin")
    return str(root)


def test_published_shards_need_to_be_told_where_the_images_are(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = published(tmp_path / "abcd1234", d_model=32)
    measured = inference.run(
        InferenceConfig(
            run=chain.run, data=DataConfig(shards=shards), out=str(tmp_path / "i"), device="cpu",
            allow_other_model=True,
        )
    )  # fmt: skip
    cfg = chain.config(
        shards=shards, inference=measured, latents=(1,), n_latents=0, allow_other_model=True
    )
    with pytest.raises(ConfigError, match=r"pickle, which is never opened.*data:img-folder"):
        visuals.run(cfg)

    folder = ImgFolder(root=str(Path(chain.photos) / "images"))  # without masks
    index = visuals.run(cfg.model_copy(update={"data": folder}))
    assert caplog.text.count("does not say how its images were cropped") == 1
    assert caplog.text.count("does not say which images it was recorded from") == 1
    assert len(Pictures.open(storage.parent(index)).examples)


@pytest.mark.parametrize(
    "data", ["gASVCwAAAA==", "[1, 2]", 3, None, {"kind": "img-folder"}, {"kind": "stars"}]
)
def test_descriptions_that_cannot_be_read(chain: Chain, data: object) -> None:
    shards = Shards.open(chain.shards)
    shards.metadata = shards.metadata.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"data:img-folder --data\.root URL"):
        recorded_data(shards)


def recorded(tmp_path: Path, data: ImageData, **changes: object) -> Shards:
    """Shards of a dataset, with the family that the chain uses."""
    cfg = ShardsConfig(
        shards_root=str(tmp_path / "shards"), family="visuals-test", ckpt="tiny", layers=(1,),
        batch_size=8, device="cpu", data=data,
    )  # fmt: skip
    return Shards.open(extract.run(cfg.model_copy(update=changes)))


def test_source_takes_skipped_images_into_account(tmp_path: Path) -> None:
    """Rows of the table count recorded images; `index` counts those of the dataset."""
    for i in range(5):
        write_png(tmp_path / "images" / f"{i}.png", i)
    (tmp_path / "images/1.png").write_bytes(b"not a picture")
    root = ImgFolder(root=str(tmp_path / "images"))
    view = Source(recorded(tmp_path, root, skip_unreadable=True)).view(1)
    assert view.index == 2
    assert view.name == "2.png"


def test_generated_images(tmp_path: Path) -> None:
    shards = recorded(tmp_path, FakeImg(n_examples=8))
    for source in (Source(shards), Source(shards, FakeImg(n_examples=8))):
        view = source.view(5)
        assert view.label == "class2"
        assert view.image.size == (64, 64)
    with pytest.raises(ImageError, match="other ones than were recorded"):
        Source(shards, FakeImg(n_examples=8, seed=1))


def test_rows_of_a_hub_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (80, 64), (30 * i, 0, 0)) for i in range(8)],
        "label": [i % 2 for i in range(8)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def save(name: str, rows: dict[str, list]) -> str:
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / name))
        return str(tmp_path / name)

    shards = recorded(tmp_path, Imagenet(name=save("here", rows)))
    (tmp_path / "here").rename(tmp_path / "moved")
    view = Source(shards, Imagenet(name=str(tmp_path / "moved"))).view(5)
    assert view.label == "dog"
    assert view.image.size == (64, 64)
    assert view.image.getpixel((3, 3)) == (150, 0, 0)

    other = save("labels", {**rows, "label": [0, 1, 0, 0, 0, 1, 0, 1]})
    with pytest.raises(ImageError, match=r"Image 3, .*#train/3, .*label 'dog'; it now has 'cat'"):
        Source(shards, Imagenet(name=other))
    large = [*rows["image"][:6], Image.effect_noise((80, 64), 90).convert("RGB"), rows["image"][7]]
    with pytest.raises(ImageError, match=r"#train/6 is not the image that was recorded.*size in"):
        Source(shards, Imagenet(name=save("pixels", {**rows, "image": large})))


def test_class_names(tmp_path: Path) -> None:
    write_photos(str(tmp_path), n=2)
    cfg = ImgSegFolder(root=str(tmp_path))
    assert read_class_names(cfg)[2] == "ramp"
    (tmp_path / "classes.csv").unlink()
    assert read_class_names(cfg) == {}
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n"
        "15\t0.01\t1\t1\tdoor, double door\n"
    )
    assert read_class_names(cfg) == {1: "wall", 15: "door"}
    (tmp_path / "classes.csv").write_text("label,name\nsky,1\n")
    with pytest.raises(ConfigError, match=r"classes\.csv, line 2.*label,name.*'sky'"):
        read_class_names(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("has_masks", [False, True])
def test_threads_hold_a_bounded_number_of_pixels(
    has_masks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads ask at once; the images that are alive are counted from load to collection."""
    monkeypatch.setattr(cores, "available", lambda: 1)
    size = (3_000, 2_500) if has_masks else (4_000, 3_000)
    image = png(np.full((size[1], size[0], 3), (9, 99, 199), np.uint8))
    mask = png(np.full((size[1], size[0]), 3, np.uint8))
    for i in range(8):
        place = tmp_path / "photos" / "images/training" if has_masks else tmp_path / "photos"
        storage.write_bytes(place / f"{i}.png", image)
        if has_masks:
            storage.write_bytes(tmp_path / "photos/annotations/training" / f"{i}.png", mask)
    kind = ImgSegFolder if has_masks else ImgFolder
    source = Source(recorded(tmp_path, kind(root=str(tmp_path / "photos"), max_pixels=13_000_000)))
    lock = threading.Lock()
    alive, most = 0, 0

    def count(n: int) -> None:
        nonlocal alive, most
        with lock:
            alive += n
            most = max(most, alive)

    def watched(load):
        def call(*args, **kwargs):
            found = load(*args, **kwargs)
            n = found.width * found.height
            count(n)
            weakref.finalize(found, count, -n)
            time.sleep(0.02)
            return found

        return call

    monkeypatch.setattr(source.dataset, "load", watched(source.dataset.load))
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(source.view, range(8)))
    assert [view.image.getpixel((5, 5)) for view in views] == [(9, 99, 199)] * 8
    assert size[0] * size[1] <= most <= PIXELS_PER_WORKER
