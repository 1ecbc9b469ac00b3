"""A run says what activations it is of, and evaluates on those of its own model."""

from pathlib import Path

import pytest
from described import described

import saev
from saev import storage, train
from saev.config import LoaderConfig, TrainConfig, ValDataConfig
from saev.config.source import ActivationSource
from saev.errors import ConfigError
from saev.train import resolve


@pytest.fixture
def known(cfg: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Training on activations whose model is recorded."""
    shards = described(
        cfg.train_data.shards, tmp_path / "known",
        network="vit", weights="sha256:aaaa", image_size=[64, 64], versions={"torch": "2.11.0"},
    )  # fmt: skip
    return cfg.model_copy(update={"train_data": LoaderConfig(shards=shards, layer=3)})


def evaluated_on(cfg: TrainConfig, shards: str, **more: object) -> TrainConfig:
    return cfg.model_copy(update={"val_data": ValDataConfig(shards=shards, **more)})


def test_run_and_checkpoint_say_what_they_are_of(known: TrainConfig) -> None:
    (url,) = train.run(known)
    run = storage.read_json(storage.join(url, "run.json"))
    source = ActivationSource.from_dict(run["source"])
    assert (source.weights, source.image_size) == ("sha256:aaaa", (64, 64))
    assert (source.layer, source.tokens, source.dtype) == (3, "content", "float32")
    assert source.versions == {"torch": "2.11.0"}
    assert run["val_source"] == run["source"]
    assert "other_model" not in run
    metadata = saev.load_sae(url).metadata
    assert metadata["run_id"] == run["run_id"]
    assert ActivationSource.from_dict(metadata) == source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "sha256:bbbb"}, r"weights sha256:aaaa…\) in training, .*sha256:bbbb…\) here"),
        ({"network": "deit"}, "model .* in training"),
        ({"image_size": [96, 96]}, "image size 64 x 64 in training, 96 x 96 here"),
    ],
)
def test_another_model_is_refused_for_evaluation(
    known: TrainConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    other = described(known.train_data.shards, tmp_path / "other", **changes)
    asked = evaluated_on(known, other)
    with pytest.raises(ConfigError, match=rf"--val-data\.shards .*{message}.*--allow-other-model"):
        train.plan(asked)
    resolve.resolve_one(asked.model_copy(update={"n_val": 0}))  # nothing is evaluated

    allowed = asked.model_copy(update={"allow_other_model": True})
    (url,) = train.run(allowed)
    run = storage.read_json(storage.join(url, "run.json"))
    assert len(run["other_model"]) == 1
    assert run["source"]["weights"] == "sha256:aaaa"
    assert run["val_source"]["shards"] != run["source"]["shards"]


def test_the_flag_is_part_of_a_name_only_where_models_differ(
    known: TrainConfig, tmp_path: Path
) -> None:
    """Without a difference it changes nothing; with one, a silent run of 0.1.0 is not taken."""
    name = resolve.run_id(resolve.resolve_one(known))
    allowed = known.model_copy(update={"allow_other_model": True})
    assert resolve.run_id(resolve.resolve_one(allowed)) == name
    same = evaluated_on(known, described(known.train_data.shards, tmp_path / "same", amp=True))
    other = evaluated_on(
        allowed,
        described(known.train_data.shards, tmp_path / "other", weights="sha256:b", amp=True),
    )
    plain, found = (resolve.resolve_one(c) for c in (same, other))
    assert resolve.run_id(plain) != resolve.run_id(found)


def test_layer_and_tokens_of_the_evaluation_are_warned_of_once(
    known: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    asked = evaluated_on(known, known.train_data.shards, layer=7, tokens="all", split="val",
                         val_fraction=0.2)  # fmt: skip
    train.plan(asked)
    train.run(asked)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text.rpartition(" was ")[2] for text in said] == [
        "trained on layer 3; it is used on layer 7.",
        "trained on content tokens; it is used on all tokens.",
    ]
