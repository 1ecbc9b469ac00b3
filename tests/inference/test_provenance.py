"""A result belongs to the model and the preprocessing that the SAE was trained on."""

import json
import shutil
from pathlib import Path

import pytest
from described import described
from inference.world import LAYER, World, make_world

import saev
from saev import inference, storage
from saev.config import DataConfig, InferenceConfig, TrainConfig
from saev.config.source import ActivationSource, compare
from saev.errors import ConfigError
from saev.inference.provenance import trained_on
from saev.inference.results import Results
from saev.nn import to_saelens
from saev.shards import Metadata, Shards
from saev.visuals import overview

SPEC = {
    "image_size": [64, 64], "resize": 72, "fit": "exact", "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip
KNOWN = {
    "family": "clip", "ckpt": "ViT-B-16/openai", "network": "ViT-B-16-quickgelu",
    "weights": "sha256:aaaa", "image_size": [64, 64], "image_spec": SPEC,
    "versions": {"torch": "2.11.0"},
}  # fmt: skip
UNKNOWN = {"network": None, "weights": None, "versions": {}}
"""What version 0.1.0 did not record of shards."""
OTHER_WIDE = {**SPEC, "image_size": [96, 96], "resize": 96}

DIFFERENT = [
    ({"weights": "sha256:bbbb"}, r"model clip ViT-B-16/openai \(weights sha256:aaaa…\) in training"
                                 r".* \(weights sha256:bbbb…\) here"),
    ({"network": "ViT-B-16"}, "model clip ViT-B-16/openai .* in training, clip .* here"),
    ({**UNKNOWN, "ckpt": "ViT-L-14/openai"}, "ViT-B-16/openai .*training, clip ViT-L-14/openai h"),
    ({**UNKNOWN, "family": "timm"}, "clip ViT-B-16/openai .*training, timm ViT-B-16/openai here"),
    ({"image_size": [96, 96], "image_spec": OTHER_WIDE, "weights": "sha256:fitted"},
     "SHARDS: image size 64 x 64 in training, 96 x 96 here. Metrics"),
    ({"image_spec": {**SPEC, "mean": [0.48, 0.46, 0.41]}},
     r"mean \(0.5, 0.5, 0.5\) in training, \(0.48, 0.46, 0.41\) here"),
    ({"image_spec": {**SPEC, "interpolation": "bilinear"}}, "bicubic in training, bilinear here"),
    ({"image_spec": {**SPEC, "resize": 64}}, "resize 72 in training, 64 here"),
]  # fmt: skip

EQUAL = [
    {},
    {"versions": {"torch": "2.14.1", "timm": "1.0"}},
    {"amp": True},
    UNKNOWN,
    {"family": "timm", "ckpt": "ViT-B-16@/elsewhere/w.pt"},  # the same tensors by another name
    {"image_size": None, "image_spec": None},
    {"image_spec": {**SPEC, "of_a_later_version": 1}},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run that records its source."""
    root = tmp_path_factory.mktemp("world")
    made = make_world(root, n_examples=8, labelled=False)
    shards = described(made.shards, root / "known", **KNOWN)
    source = Shards.open(shards).metadata.source(LAYER, "content")
    config = storage.read_json(f"{made.run}/config.json")
    config["train_data"]["shards"] = shards
    storage.write_json(f"{made.run}/config.json", config)
    made.sae.save(f"{made.run}/checkpoint", {"run_id": "r0", **source.to_dict()})
    return World(shards, made.run, made.acts, None)


def config(run: str, shards: str = "", **kwargs: object) -> InferenceConfig:
    data = DataConfig(shards=shards, layer=LAYER if shards else None)
    return InferenceConfig(run=run, data=data, device="cpu", **kwargs)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(("changes", "message"), DIFFERENT)
def test_another_model_is_refused(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, message: str
) -> None:
    shards = described(world.shards, tmp_path / "other", **changes)
    cfg = config(world.run, shards, out=str(tmp_path / "out"))
    for call in (inference.run, inference.find, inference.finish):
        with pytest.raises(ConfigError, match=message.replace("SHARDS", shards)):
            call(cfg)
    assert not (tmp_path / "out").exists()

    url = inference.run(cfg.model_copy(update={"allow_other_model": True}))
    metrics = storage.read_json(f"{url}/metrics.json")
    assert len(metrics["other_model"]) == 1
    assert metrics["source"]["shards"] == Shards.open(shards).metadata.hash
    assert metrics["trained_on"]["weights"] == "sha256:aaaa"
    assert Results.open(url).other_model == metrics["other_model"]
    (said,) = warnings(caplog)
    assert "as --allow-other-model says" in said
    assert metrics["other_model"][0] in said


@pytest.mark.parametrize("changes", EQUAL)
def test_the_same_model_is_not(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict
) -> None:
    shards = described(world.shards, tmp_path / "same", **changes)
    cfg = config(world.run, shards, out=str(tmp_path / "out"))
    metrics = Results.open(inference.run(cfg)).metrics
    assert "other_model" not in metrics
    assert metrics["source"]["versions"] == changes.get("versions", KNOWN["versions"])
    assert warnings(caplog) == []


def test_a_flag_that_is_not_needed_changes_nothing(world: World) -> None:
    plain = inference.run(config(world.run))
    assert inference.run(config(world.run, allow_other_model=True)) == plain
    assert "allow_other_model" not in storage.read_json(f"{plain}/config.json")["config"]


def test_a_result_of_version_0_1_0_is_not_taken_for_one_that_says_so(
    world: World, tmp_path: Path
) -> None:
    """It measured on activations of another model without a word, under the key of that pair."""
    shards = described(world.shards, tmp_path / "other", weights="sha256:cccc")
    allowed = inference.run(config(world.run, shards, allow_other_model=True))
    silent = measured_silently(world, shards, tmp_path)
    assert storage.name(silent) != storage.name(allowed)


def measured_silently(world: World, shards: str, tmp_path: Path) -> str:
    """The folder of results as of version 0.1.0, which did not know what a run was trained on."""
    checkpoint = storage.read_sealed(f"{world.run}/checkpoint/config.json").record
    silent = {k: v for k, v in checkpoint["metadata"].items() if k not in ("weights", "network")}
    old = tmp_path / "old"
    shutil.copytree(world.run, old)
    storage.write_json(f"{old}/checkpoint/config.json", {**checkpoint, "metadata": silent})
    return inference.run(config(str(old), shards))


@pytest.mark.parametrize("same", [False, True])
def test_the_result_of_a_run_is_the_one_that_would_be_made_today(
    world: World, tmp_path: Path, same: bool
) -> None:
    """Two results on one shards folder: with and without the mark that the model is another."""
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    shutil.rmtree(run / "inference", ignore_errors=True)
    shards = described(world.shards, tmp_path / "other", weights="sha256:cccc")
    marked = inference.run(config(str(run), shards, allow_other_model=True))
    silent = measured_silently(world, shards, tmp_path)
    shutil.copytree(silent, run / "inference" / storage.name(silent))
    if same:  # as if the mark were the mistake: the run says that it was trained on these
        place = f"{run}/checkpoint/config.json"
        record = storage.read_sealed(place).record
        record["metadata"]["weights"] = "sha256:cccc"
        storage.write_json(place, record)
    found = Results.find(str(run), Shards.open(shards).metadata.hash, shards)
    assert storage.name(found.url) == storage.name(silent if same else marked)


def test_untrained_networks_are_told_by_name() -> None:
    """Equal architectures have equal untrained weights, whose last bits depend on the processor."""
    deit, vit = (
        ActivationSource(family="timm", ckpt=f"{name}/random", network=f"{name}/random", weights=w)
        for name, w in (("deit_tiny", "sha256:aa"), ("vit_tiny", "sha256:aa"))
    )
    elsewhere = vit.model_copy(update={"weights": "sha256:ab"})
    assert compare(vit, deit).refused == [
        "model timm vit_tiny/random in training, timm deit_tiny/random here"
    ]
    assert compare(vit, elsewhere) == ([], [])


def test_weights_by_the_checksum_of_their_file() -> None:
    """As version 0.1.0 recorded them, of names that name a file."""
    here, there, other = (
        ActivationSource(family="clip", ckpt=f"ViT-B-16@{place}/w.pt", ckpt_checksum=checksum)
        for place, checksum in (("/a", "sha256:1"), ("s3://b", "sha256:1"), ("/a", "sha256:2"))
    )
    assert compare(here, there) == ([], [])
    assert compare(here, other).refused == [
        "model clip ViT-B-16@w.pt (weights sha256:1…) in training, "
        "clip ViT-B-16@w.pt (weights sha256:2…) here"
    ]


def test_layer_and_tokens_are_warned_of_once(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    data = DataConfig(shards=world.shards, layer=3, tokens="all")
    cfg = InferenceConfig(run=str(run), data=data, device="cpu")
    inference.find(cfg)
    inference.plan(cfg)
    inference.run(cfg)
    inference.finish(cfg)
    assert warnings(caplog) == [
        f"The SAE at {run} was trained on layer 7; it is used on layer 3.",
        f"The SAE at {run} was trained on content tokens; it is used on all tokens.",
    ]


# --- Older and other sources ---------------------------------------------------------------


def old_run(world: World, tmp_path: Path) -> str:
    """As version 0.1.0 left it: by six keys of the checkpoint."""
    run = tmp_path / "old"
    shutil.copytree(world.run, run)
    place = run / "checkpoint/config.json"
    record = storage.read_sealed(place).record  # it had no checksum of its own
    keys = ("run_id", "family", "ckpt", "layer", "tokens", "shards")
    record["metadata"] = {k: record["metadata"][k] for k in keys} | {"n_tokens": 10}
    place.write_text(json.dumps(record))
    return str(run)


def test_an_old_run_takes_what_it_lacks_from_its_shards(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = old_run(world, tmp_path)
    cfg = config(run)
    inference.run(cfg)
    inference.finish(cfg)
    (said,) = warnings(caplog)
    assert said.startswith(f"{run} was trained by version 0.1.0 of saev, which did not record")
    assert f"taken from {world.shards}" in said
    other = described(world.shards, tmp_path / "o", image_size=[32, 32], image_spec=None)
    with pytest.raises(ConfigError, match="image size 64 x 64 in training, 32 x 32 here"):
        inference.run(config(run, other))


@pytest.mark.parametrize("how", ["gone", "changed", "elsewhere"])
def test_an_old_run_without_its_shards(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    run = old_run(world, tmp_path)
    place = Path(run, "config.json")
    named = {
        "gone": str(tmp_path / "nothing"),
        "changed": described(world.shards, tmp_path / "changed", image_size=[9, 9]),
        "elsewhere": "s3://a-bucket-of-somebody/shards/0123456789abcdef",
    }[how]
    raw = json.loads(place.read_text())
    raw["train_data"]["shards"] = named
    place.write_text(json.dumps(raw))
    source = trained_on(run)
    assert source is not None
    assert (source.ckpt, source.layer, source.image_size) == ("ViT-B-16/openai", LAYER, None)
    (said,) = warnings(caplog)
    assert "not known, since its shards are gone" in said
    other = described(world.shards, tmp_path / "other", ckpt="ViT-B-32/openai")
    with pytest.raises(ConfigError, match="ViT-B-16/openai in training, clip ViT-B-32/openai"):
        inference.run(config(run, other))


def test_imported_saes_are_warned_of_once(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to_saelens(world.sae, str(tmp_path / "sae"))
    cfg = config(str(tmp_path / "sae"), world.shards, out=str(tmp_path / "out"))
    inference.find(cfg)
    url = inference.run(cfg)
    (said,) = warnings(caplog)
    assert "does not say which activations it was trained on" in said
    assert Results.open(url).metrics["trained_on"] is None


def test_a_checkpoint_folder_is_compared_as_well(world: World, tmp_path: Path) -> None:
    checkpoint = f"{world.run}/checkpoint"
    assert saev.load_sae(checkpoint).metadata["ckpt"] == "ViT-B-16/openai"
    other = described(world.shards, tmp_path / "other", weights="sha256:dddd")
    with pytest.raises(ConfigError, match="sha256:dddd"):
        inference.run(config(checkpoint, other, out=str(tmp_path / "out")))


def test_shards_that_a_run_names_are_near_it_or_named_by_the_user(
    world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    place = run / "config.json"
    for url in ("http://127.0.0.1:9/shards", "s3://other/shards", "/proc/self", "../shards"):
        raw = json.loads(place.read_text())
        raw["train_data"]["shards"] = url
        place.write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match=r"names .*only if you name it.*--data\.shards URL"):
            inference.plan(config(str(run)))
    assert inference.plan(config(str(run), world.shards))


def test_sources_are_plain_json(world: World) -> None:
    source = Metadata.read(world.shards).source(LAYER, "content")
    assert ActivationSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    later = {**source.to_dict(), "of_a_later_version": 1}
    assert ActivationSource.from_dict(later) == source


def test_the_overview_says_so(world: World, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(world.run, root / "runs/0123456789ab")
    run = str(root / "runs/0123456789ab")
    storage.write_json(f"{run}/run.json", {})
    shutil.rmtree(f"{run}/inference", ignore_errors=True)
    cfg = TrainConfig.of_run(run)
    storage.write_json(f"{run}/config.json", cfg.to_dict())
    other = described(world.shards, tmp_path / "other", weights="sha256:<b>ee</b>")
    inference.run(config(run, world.shards))
    inference.run(config(run, other, allow_other_model=True))
    text = storage.read_text(overview.write(str(root)))
    assert text.count("Trained on another model: model clip ViT-B-16/openai") == 1
    assert "<b>ee</b>" not in text
