"""A misspelt key of a config file gets the nearest valid one, wherever it stands."""

import json
from pathlib import Path

import pytest

from pipelines import settings
from pipelines.options import CompileOptions
from saev.config.run import RunFile
from saev.config.stages import resolve_stages
from saev.errors import ConfigError

FILE = """\
[data]
kind = "img-folder"
root = "/pictures"

[shards]
family = "dinov2"
ckpt = "vits14"
layers = [-1]

"""
WRONG = [
    ("[trian]\nn_train = 5", "trian", "train"),
    ("[train]\nn_trian = 5", "n_trian", "n_train"),
    ("[train]\nn-train = 5", "n-train", "n_train"),
    ("[train.sae]\nd_sea = 768", "sae.d_sea", "d_sae"),
    ('[train.sae.activation]\nkind = "top-k"\ntop_kk = 8', "top_kk", "top_k"),
    ("[train.train_data]\nlayerr = 3", "train_data.layerr", "layer"),
    ("[train]\nd_sae = 768", "d_sae", "sae.d_sae"),
    ("[train]\ntop_k = 8", "top_k", "sae.activation.top_k"),
    ("[inference.data]\nlayr = 3", "data.layr", "layer"),
    ("[visuals]\nn_latent = 3", "n_latent", "n_latents"),
    ("[sweep]\nlrr = [1e-3]", "lrr", "lr"),
    ("[sweep.sae]\nd_sea = [768]", "sae.d_sea", "sae.d_sae"),
]  # fmt: skip


def refused(path: Path) -> str:
    """What is wrong with a file of `saev run --config`."""
    with pytest.raises(ConfigError) as caught:
        resolve_stages(RunFile.read(str(path)), str(path.parent), None, path.name)
    return str(caught.value)


@pytest.mark.parametrize(("table", "key", "meant"), WRONG)
def test_toml(tmp_path: Path, table: str, key: str, meant: str) -> None:
    (tmp_path / "c.toml").write_text(FILE + table)
    message = refused(tmp_path / "c.toml")
    assert key in message
    assert f" Did you mean {meant}?" in message


def test_json_and_a_kind_of_images(tmp_path: Path) -> None:
    raw = {"data": {"kind": "img-folder", "rooot": "/pictures"}}
    (tmp_path / "c.json").write_text(json.dumps(raw))
    assert 'rooot: unknown key (found "/pictures"). Did you mean root?' in refused(
        tmp_path / "c.json"
    )


def test_nothing_similar_is_no_hint(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(FILE + "[train]\nxyzzy = 1")
    assert refused(tmp_path / "c.toml") == "Invalid c.toml [train]: xyzzy: unknown key (found 1)"


def test_a_file_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text("imge = 'x'\n")
    with pytest.raises(ConfigError, match=r"'imge' in cluster.toml. Did you mean image\?"):
        settings.load({}, environ={})
    with pytest.raises(ConfigError, match=r"paralelism: unknown key .* mean parallelism\?"):
        CompileOptions.from_dict({"image": "x", "cpu_image": "x", "paralelism": 3})
