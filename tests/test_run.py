"""`saev run`: all four stages from one file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saev import cli, run, storage
from saev.config import FakeImgSeg, ImgSegFolder, LoaderConfig, TrainConfig
from saev.config.named import named_config
from saev.config.run import RunConfig, RunFile
from saev.config.stages import resolve_stages
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
    assert "timm test_vit/random, activations" in html
    assert "<figure>" in html
    assert html.count(">best<") == 1
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
        stages = resolve_stages(file, str(tmp_path), None, "the file")
        training = stages.training("s3://b/shards")
        assert (training.train_data.layer, training.val_data.layer) == (3, 7)
        data = stages.measuring(str(tmp_path / "run"), "s3://b/shards").data
        assert (data.shards, data.layer, data.tokens) == ("s3://b/shards", measured, "all")


def test_no_images(config: Path) -> None:
    text = FILE[FILE.index("[shards]") :]
    config.write_text(text)
    with pytest.raises(ConfigError, match="No images"):
        run.resolve(RunConfig(config=str(config)))


def test_warnings_are_printed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stages come upon the same things: the sweep, the images, what the SAE was trained on."""
    root = tmp_path / "masks"
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        for folder, image in (("images", pixels), ("annotations", pixels[..., 0] % 3)):
            place = root / folder / "training"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")
    Image.fromarray(pixels[..., 0] % 3).save(root / "annotations/training/more.png")
    (root / "labels.csv").write_text("stem,label\n0,cat\n1,dog\n")
    file = {
        "data": {"kind": "img-seg-folder", "root": str(root)},
        "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 64, "layers": [-1],
                   "device": "cpu"},
        "train": {"n_train": 640, "batch_size": 1000, "n_val": 0, "device": "cpu",
                  "sae": {"d_sae": 32}},
        "sweep": {"lr": [1e-3, 1e-3, 2e-3]},
        "inference": {"n_top": 2, "device": "cpu", "data": {"tokens": "all"}},
        "visuals": {"n_latents": 1, "n_top": 1, "log_freq_range": [-6, 0]},
    }  # fmt: skip
    place = tmp_path / "config.json"
    place.write_text(json.dumps(file))
    run.run(RunConfig(config=str(place), root=str(tmp_path / "root")))
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == len(set(said)), said
    for text in ("combinations are repeated", "masks in", "have no label", "used on all tokens"):
        assert [text in message for message in said].count(True) in (1, 2), (text, said)


# --- saev run ~/pictures -----------------------------------------------------------------------


def pictures(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config that comes with saev, with a network that needs no hub."""
    ours = Path(named_config("first-look"))
    text = ours.read_text().replace('"dinov2"', '"timm"').replace('"vits14"', '"test_vit/random"')
    file = tmp_path / "first-look.toml"
    file.write_text(text.replace("image_size = 224", "image_size = 32"))
    monkeypatch.setattr(run, "named_config", {"first-look": str(file)}.__getitem__)
    monkeypatch.setattr("saev.config.train.LEAST_TOKENS", 4_000)
    return file


def test_a_folder_of_pictures_is_enough(
    first_look: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = pictures(tmp_path / "pictures", 3)
    cfg = RunConfig(pictures=str(folder), config=str(first_look), root=str(tmp_path / "out"))
    page = run.run(cfg)
    html = storage.read_text(page)
    assert "NMSE: squared error over variance" in html
    assert "<figure>" not in html, "one SAE has nothing to be compared with"
    assert ">best<" not in html
    (found,) = (tmp_path / "out" / "runs").iterdir()
    config = TrainConfig.of_run(found)
    # 3 pictures of 2 x 2 patches; the test network is 64 wide.
    assert (config.n_train, config.sae.d_sae) == (4_000, 128)
    assert "DINOv2 ViT-S/14 (Apache License 2.0), from the model hub" in caplog.text
    assert "Recording 3 images: 12 patches, layer 5, 0.0 MB." in caplog.text
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    has_bfloat16 = bool(flags & {"avx512_bf16", "amx_bf16"}) and not torch.cuda.is_available()
    assert ("--amp (amp = true under [shards]" in caplog.text) == has_bfloat16
    assert "Training 1 SAE on 4,000 tokens: 500 epochs of 8." in caplog.text
    # 100 tokens for each latent: 12,800 tokens are 3,200 images.
    assert "8 tokens are few for 128 latents" in caplog.text
    assert "3,200 images or more" in caplog.text


@pytest.mark.parametrize(
    ("n_tokens", "n_train", "d_sae"),
    [
        (1_536, 300_000, 768),  # six pictures
        (100_000, 1_000_000, 768),
        (153_599, 1_535_990, 768),
        (153_600, 1_536_000, 1_536),  # 100 tokens for each latent
        (40_000_000, 10_000_000, 1_536),
    ],
)
def test_a_first_look_suits_the_data(n_tokens: int, n_train: int, d_sae: int) -> None:
    """Ten epochs, between 300,000 tokens and the config's 10 million."""
    training = TrainConfig.from_dict(RunFile.read(named_config("first-look")).train)
    found = run.suited(training, n_tokens, 384)
    assert (found.n_train, found.sae.exp_factor * 384) == (n_train, d_sae)


def test_masks_are_recognised(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "plain", 1)
    assert run.recognised(str(folder)).kind == "img-folder"
    for split in ("validation", "training"):
        pictures(tmp_path / "seg" / "images" / split, 1)
        found = run.recognised(str(tmp_path / "seg"))
        assert found.kind == "img-folder"  # there are no masks yet
    (tmp_path / "seg" / "annotations").mkdir()
    found = run.recognised(str(tmp_path / "seg"))
    assert isinstance(found, ImgSegFolder)
    assert found.split == "training"


def test_images_are_named_once(config: Path, tmp_path: Path) -> None:
    cfg = RunConfig(
        pictures=str(tmp_path), config=str(config), data=FakeImgSeg(n_examples=3), root="out"
    )
    with pytest.raises(ConfigError, match="named twice"):
        run.resolve(cfg)


def test_flags_replace_keys_of_the_file(config: Path, tmp_path: Path) -> None:
    file = config.read_text().replace("[train]", "batch_size = 7\n[train]", 1)
    config.write_text(file)
    plain = run.resolve(RunConfig(config=str(config))).shards
    assert (plain.ckpt, plain.skip_unreadable) == ("test_vit/random", False)
    shards = run.resolve(RunConfig(config=str(config), ckpt="x@y", amp=True)).shards
    assert (shards.ckpt, shards.amp, shards.batch_size) == ("x@y", True, 7)
    assert run.resolve(RunConfig(config=str(config), skip_unreadable=True)).shards.skip_unreadable
    # A damaged picture does not stop a first look.
    assert run.resolve(RunConfig(pictures=str(tmp_path))).shards.skip_unreadable


def test_no_images_is_said_in_words_of_the_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert capsys.readouterr().err.startswith(
        "saev: error: No images: name a folder of pictures (`saev run FOLDER`)"
    )
