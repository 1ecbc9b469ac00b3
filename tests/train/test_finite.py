"""NaN and infinity in shards: the first pass that meets them says which, and where."""

import numpy as np
import pytest

from saev import inference, storage, train
from saev.config import DataConfig, InferenceConfig, LoaderConfig
from saev.errors import CorruptDataError
from saev.shards.protocol import in_validation

from . import synthetic

LAYERS = (3, 7)
N = 300


def acts():
    truth = synthetic.make_truth()
    rng = np.random.default_rng(0)
    codes = rng.uniform(0, 1, (2, N, 5, len(truth.dictionary))) > 0.9
    return (codes.astype(np.float32) @ truth.dictionary + truth.mean).astype(np.float32)


def folder(root, monkeypatch, example, value, *, known=False, protocol="3.0"):
    """Shards with one value that is no number, in layer 7; its statistics are, if known, finite."""
    x = acts()
    stats = synthetic._stats(x)
    x[1, example, 3, 20] = value
    with monkeypatch.context() as patch:
        if known:
            patch.setattr(synthetic, "_stats", lambda acts: stats)
        return synthetic.write_acts(str(root), x, LAYERS, 128, protocol)


def examples(side):
    in_val = in_validation(np.arange(N), 0.2)
    return np.flatnonzero(in_val if side == "val" else ~in_val)


def cfg_of(cfg, url):
    data = LoaderConfig(shards=url, layer=7, val_fraction=0.2, buffer_mb=0.5)
    return cfg.model_copy(update={"train_data": data, "n_train": 4000})


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinity")])
@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("known", [False, True], ids=["in the statistics", "nowhere noted"])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_training_names_value_shard_example_and_layer(
    cfg, tmp_path, monkeypatch, value, kind, side, known
):
    """The statistics said: "all recorded activations of this layer are the same vector"."""
    example = int(examples(side)[-3])
    url = folder(tmp_path, monkeypatch, example, value, known=known)
    shard = f"acts{example // 128:06d}.bin"
    with pytest.raises(
        CorruptDataError, match=rf"{shard} holds {kind} .* of example {example}, layer 7;"
    ):
        train.run(cfg_of(cfg, url))
    assert not storage.exists(str(tmp_path / "runs")) or not list(tmp_path.glob("runs/*/run.json"))
    other = cfg_of(cfg, url)
    other = other.model_copy(
        update={"train_data": other.train_data.model_copy(update={"layer": 3})}
    )
    assert len(train.run(other)) == 1  # the other layer is sound


def test_folders_without_statistics_are_measured_with_the_same_care(cfg, tmp_path, monkeypatch):
    url = folder(tmp_path, monkeypatch, 11, np.nan, protocol="2.1")
    with pytest.raises(CorruptDataError, match="NaN in the activations of example 11, layer 7"):
        train.run(cfg_of(cfg, url))


def test_statistics_alone_may_be_wrong(cfg, tmp_path, monkeypatch):
    broken = synthetic._stats(np.full((2, N, 5, 32), np.nan, np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_stats", lambda acts: broken)
        url = synthetic.write_acts(str(tmp_path), acts(), LAYERS, 128)
    with pytest.raises(CorruptDataError, match=r"statistics of layer 7 .* but its activations do"):
        train.run(cfg_of(cfg, url))


def test_inference_names_the_place(cfg, tmp_path, monkeypatch):
    sound = synthetic.write_acts(str(tmp_path / "sound"), acts(), LAYERS, 128)
    (run,) = train.run(cfg_of(cfg, sound))
    url = folder(tmp_path / "bad", monkeypatch, 200, -np.inf, known=True)
    measuring = InferenceConfig(run=run, data=DataConfig(shards=url), device="cpu")
    with pytest.raises(
        CorruptDataError, match=r"acts000001\.bin holds infinity .* of example 200, layer 7"
    ):
        inference.run(measuring)
