"""Where the pictures come from."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from saev import inference, storage, visuals
from saev.config import DataConfig, FakeImg, Imagenet, ImgFolder, ImgSegFolder, InferenceConfig
from saev.errors import ConfigError
from saev.shards import Shards
from saev.visuals.source import Source, read_class_names, recorded_data
from visuals.chain import Chain, write_photos


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
            run=chain.run, data=DataConfig(shards=shards), out=str(tmp_path / "i"), device="cpu"
        )
    )
    cfg = chain.config(shards=shards, inference=measured, latents=(1,), n_latents=0)
    with pytest.raises(ConfigError, match=r"pickle, which is never opened.*data:img-folder"):
        visuals.run(cfg)

    folder = ImgFolder(root=str(Path(chain.photos) / "images"))  # without masks
    index = visuals.run(cfg.model_copy(update={"data": folder}))
    assert "does not say how its images were cropped" in caplog.text
    record = storage.read_json(
        storage.join(storage.parent(index), "latents", "000001", "latent.json")
    )
    labels = Shards.open(shards).labels()
    assert labels is not None
    for example in record["examples"]:
        # One label per patch is all there is; it is drawn patch by patch.
        shares = {c["label"]: c["share"] for c in example["classes"]}
        for label, share in shares.items():
            assert share == pytest.approx((labels[example["example"]] == label).mean(), abs=1e-4)


@pytest.mark.parametrize(
    "data", ["gASVCwAAAA==", "[1, 2]", 3, None, {"kind": "img-folder"}, {"kind": "stars"}]
)
def test_descriptions_that_cannot_be_read(chain: Chain, data: object) -> None:
    shards = Shards.open(chain.shards)
    shards.metadata = shards.metadata.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"data:img-folder --data\.root URL"):
        recorded_data(shards)


def test_source_takes_skipped_images_into_account(chain: Chain) -> None:
    """Rows of the table count recorded images; `index` counts those of the dataset."""
    shards = Shards.open(chain.shards)
    full = shards.examples()
    shards.examples = lambda: full.slice(3)  # type: ignore[method-assign] - the first three left out
    view = Source(shards).view(0)
    assert view.index == 3
    assert view.name == "a&b 3.png"


def test_generated_images(chain: Chain) -> None:
    shards = Shards.open(chain.shards)
    shards.examples = lambda: pa.table({"index": np.arange(8)})  # type: ignore[method-assign]
    view = Source(shards, FakeImg(n_examples=8)).view(5)
    assert view.label == "class2"
    assert view.image.size == (64, 64)


def test_rows_of_a_hub_dataset(chain: Chain, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (80, 64), (30 * i, 0, 0)) for i in range(8)],
        "label": [i % 2 for i in range(8)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    name = str(tmp_path / "moved")
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(name)
    shards = Shards.open(chain.shards)
    urls = [f"org/was-on-the-hub#train/{i}" for i in range(8)]
    table = shards.examples()
    shards.examples = lambda: table.set_column(1, "url", [urls])  # type: ignore[method-assign]
    assert table.column_names[1] == "url"
    view = Source(shards, Imagenet(name=name)).view(5)
    assert view.label == "dog"
    assert view.image.size == (64, 64)
    assert view.image.getpixel((3, 3)) == (150, 0, 0)


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
