"""`saev run`: all four stages from one file."""

from pathlib import Path

import pytest

from saev import run, storage
from saev.config import FakeImgSeg, LoaderConfig, TrainConfig
from saev.config.run import RunConfig, RunFile
from saev.config.stages import resolve
from saev.errors import ConfigError

FILE = """
[data]
kind = "fake-img-seg"
n_examples = 16
image_size = 64

[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 64
layers = [-1]

[train]
n_train = 400
sweep = "sweep.toml"

[train.sae]
d_sae = 64

[train.train_data]
val_fraction = 0.25

[visuals]
n_latents = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config, with its sweep beside it."""
    (tmp_path / "sweep.toml").write_text("[sae.activation]\ntop_k = [2, 4]\n")
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return path


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_images_in_picture_book_out(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "o::ut [1] é %20#?"  # a name is only a name
    cfg = RunConfig(config=str(config), root=str(root))
    page = Path(run.run(cfg))
    html = page.read_text()
    reports = sorted(root.glob("runs/*/inference/*/report/index.html"))
    assert len(reports) == 2
    for report in reports:
        assert f'href="{report.relative_to(root)}"' in html
    before = contents(root)
    assert run.run(cfg) == str(page)
    assert contents(root) == before, "what was done was done again"


def test_other_images_than_the_files(config: Path, tmp_path: Path) -> None:
    cfg = RunConfig(config=str(config), data=FakeImgSeg(n_examples=3))
    assert run.resolve(cfg).shards.data == FakeImgSeg(n_examples=3)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("n_latents = 2", "n_latent = 2", "n_latent"),
        ("n_train = 400", 'n_train = "many"', "n_train"),
        ("[visuals]", "[visual]", "visual"),
        ("layers = [-1]", 'shards_root = "x"', "shards_root"),
        ("layers = [-1]", "layers = [-1", "TOML"),
        ("[visuals]", '[visuals]\nrun = "x"', "run is set"),
    ],
)
def test_a_mistake_in_the_file_stops_before_anything_starts(
    old: str, new: str, expected: str, config: Path, tmp_path: Path
) -> None:
    config.write_text(FILE.replace(old, new))
    root = tmp_path / "out"
    with pytest.raises(ConfigError, match=expected) as error:
        run.run(RunConfig(config=str(config), root=str(root)))
    assert str(config) in str(error.value)
    assert not root.exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[train.train_data]\nshards = "x"', r"\[train\.train_data\]: shards is set by `saev run`"),
        ('[inference.data]\nshards = "x"', r"\[inference\.data\]: shards is set by `saev run`"),
    ],
)
def test_shards_are_not_overwritten_in_silence(
    config: Path, tmp_path: Path, table: str, message: str
) -> None:
    config.write_text(FILE.replace("[train.train_data]", table))
    with pytest.raises(ConfigError, match=message):
        run.run(RunConfig(config=str(config), root=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_layers_that_are_named_count(tmp_path: Path) -> None:
    raw = {
        "data": {"kind": "fake-img"},
        "train": {"train_data": {"layer": 3}, "val_data": {"layer": 7}},
        "inference": {"data": {"layer": 5}},
    }
    trained = TrainConfig(train_data=LoaderConfig(layer=3, tokens="all"))
    storage.write_json(str(tmp_path / "run/config.json"), trained.to_dict())
    for own, measured in ((raw["inference"], 5), ({}, 3)):
        file = RunFile.from_dict({**raw, "inference": own})
        stages = resolve(file, str(tmp_path), None, "the file")
        training = stages.training("s3://b/shards")
        assert (training.train_data.layer, training.val_data.layer) == (3, 7)
        data = stages.measuring(str(tmp_path / "run"), "s3://b/shards").data
        assert (data.shards, data.layer, data.tokens) == ("s3://b/shards", measured, "all")


def test_no_images(config: Path) -> None:
    text = FILE[FILE.index("[shards]") :]
    config.write_text(text)
    with pytest.raises(ConfigError, match="No images"):
        run.resolve(RunConfig(config=str(config)))
