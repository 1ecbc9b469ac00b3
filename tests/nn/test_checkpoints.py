"""Saving, loading, folding, and the hub. All files are written by the tests."""

import contextlib
import json

import numpy as np
import pytest
import s3_proxy
import torch
from described import files_below
from nn.small_saes import ACTIVATIONS, IDS, D, S, equal_saes, inputs, make_sae
from nn.test_published import HEADERS, write_published

import saev
from saev import storage
from saev.config import BatchTopK, Relu, SaeConfig, TopK
from saev.errors import CheckpointError, ConfigError, StorageError
from saev.nn import SparseAutoencoder, fold_normalization, load_sae

# --- The model -------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS, ids=IDS)
def test_the_model_is_its_equations(act):
    sae, x = make_sae(act), inputs()
    z = (x.numpy() @ sae.W_enc.numpy()) + sae.b_enc.numpy()
    f = np.zeros_like(z)
    for b in range(len(z)):
        for s in range(S):
            rank = (z[b] > z[b, s]).sum()
            if act.kind == "relu":
                keep = z[b, s] > 0
            elif act.kind == "top-k":
                keep = rank < act.top_k and (z[b, s] > 0 or not act.rectify)
            else:
                keep = z[b, s] > np.broadcast_to(sae.threshold.numpy(), S)[s]
            f[b, s] = z[b, s] if keep else 0
    x_hat, acts = sae(x)
    np.testing.assert_allclose(acts.numpy(), f, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        x_hat.numpy(), f @ sae.W_dec.numpy() + sae.b_dec.numpy(), rtol=1e-4, atol=1e-5
    )
    encoded = sae.encode(x)
    assert torch.equal(encoded.acts, acts)
    np.testing.assert_allclose(encoded.pre_acts.numpy(), z, rtol=1e-5, atol=1e-6)
    top = encoded.top(4)
    assert top.values.shape == top.indices.shape == (len(x), 4)
    assert torch.equal(acts.gather(1, top.indices), top.values)
    assert torch.equal(top.values[:, 0], acts.max(1).values)


def test_leading_dimensions_are_kept_and_prefixes_cut():
    sae, x = make_sae(TopK(top_k=3)), inputs(12).view(3, 4, D)
    x_hat, acts = sae(x)
    assert x_hat.shape == (3, 4, D)
    assert acts.shape == (3, 4, S)
    assert torch.allclose(sae.decode(acts, prefix=S), x_hat, atol=1e-6)
    assert torch.equal(sae.decode(acts, prefix=0), sae.b_dec.expand(3, 4, D))
    cut = acts.clone()
    cut[..., 5:] = 0
    assert torch.allclose(sae.decode(acts, prefix=5), sae.decode(cut), atol=1e-6)
    with pytest.raises(ConfigError, match="prefix is 15"):
        sae.decode(acts, prefix=15)


def test_activations_of_another_width_are_an_error_with_both_numbers():
    with pytest.raises(ConfigError, match=r"width 6.*have 7"):
        make_sae(Relu()).encode(torch.zeros(2, 7))


# --- Folding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.25, 3.0])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=IDS)
def test_a_folded_sae_on_raw_activations_does_what_training_saw(act, scale):
    sae, mean = make_sae(act), torch.randn(D, generator=torch.Generator().manual_seed(2)) * 5
    folded = fold_normalization(sae, mean, scale)
    y = inputs()
    x = y.double() / scale + mean.double()
    x_hat, acts = folded(x.float())
    y_hat, f = sae(y)
    assert 0 < (f != 0).double().mean() < 1
    torch.testing.assert_close(acts, f / scale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x_hat, y_hat / scale + mean, rtol=1e-3, atol=1e-3)
    assert torch.equal(folded.W_dec, sae.W_dec)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(S))


def test_folding_nothing_changes_nothing_and_nonsense_is_an_error():
    sae = make_sae(BatchTopK(top_k=3))
    assert equal_saes(sae, fold_normalization(sae, None, 1.0))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="scale"):
            fold_normalization(sae, None, scale)
    with pytest.raises(ConfigError, match=r"\[7\].*\[6\]"):
        fold_normalization(sae, torch.zeros(7), 1.0)


# --- Our own format --------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["local", "memory"])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=IDS)
def test_save_and_load_are_exact_on_any_storage(act, root, tmp_path):
    url = str(tmp_path / "a") if root == "local" else f"memory://sae-{act.kind}"
    sae = make_sae(act)
    sae.save(url, metadata={"layer": 11})
    loaded = saev.load_sae(url)
    assert equal_saes(sae, loaded)
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded(inputs()).x_hat, sae(inputs()).x_hat)
    first = {u: storage.read_bytes(u) for u in files_below(url)}
    loaded.save(url, metadata={"layer": 11})
    assert {u: storage.read_bytes(u) for u in files_below(url)} == first
    assert storage.read_json(storage.join(url, "config.json"))["metadata"] == {"layer": 11}


def test_a_run_folder_is_loaded_from_its_checkpoint(tmp_path):
    sae = make_sae(TopK(top_k=3))
    sae.save(str(tmp_path / "run" / "checkpoint"))
    storage.write_json(str(tmp_path / "run" / "config.json"), {"lr": 1})
    assert equal_saes(sae, load_sae(str(tmp_path / "run")))
    assert equal_saes(sae, load_sae(str(tmp_path / "run" / "checkpoint")))


@pytest.fixture
def saved(tmp_path):
    make_sae(TopK(top_k=3)).save(str(tmp_path))
    return tmp_path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 9, 200, -1])
def test_a_flipped_bit_is_an_error(saved, at):
    flip(saved / "sae.safetensors", at)
    with pytest.raises(CheckpointError, match=r"is damaged: it has checksum .* expected"):
        load_sae(str(saved))


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_an_error(saved, size):
    weights = saved / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"is damaged: it has \d+ bytes, expected"):
        load_sae(str(saved))


def edit(saved, change):
    """Change a config.json of version 0.1.0, which had no checksum of its own."""
    record = json.loads((saved / "config.json").read_text())
    del record["files"], record["checksum"]
    change(record)
    (saved / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["sae"].update(d_model=7), r"W_enc has shape \[6, 14\], expected \[7, 14\]"),
        (lambda r: r["sae"].update(d_sae=15), r"expected \[6, 15\]"),
        (lambda r: r["sae"].update(d_sae=6 * 10**9), r"expected \[6, 6000000000\]"),
        (
            lambda r: r["sae"]["activation"].update(top_k=15),
            "keeps 15 latents per token",
        ),
        (lambda r: r["sae"].update(activation={"kind": "jump-relu"}), "tensors.*threshold"),
        (lambda r: r.update(version=99), "version 99"),
        (lambda r: r.update(format="x"), "not an SAE config"),
        (lambda r: r.pop("weights"), "size and checksum"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_an_error(saved, change, message):
    edit(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(saved))


def test_a_config_of_version_0_1_0_is_read(saved):
    before = load_sae(str(saved))
    edit(saved, lambda r: None)
    assert equal_saes(before, load_sae(str(saved)))


def test_every_bit_of_the_config_counts(saved):
    """Or it changes nothing, as one in white space."""
    before, place = load_sae(str(saved)), saved / "config.json"
    data = place.read_bytes()
    for bit in range(0, 8 * len(data), 5):
        place.write_bytes(s3_proxy.flip(data, bit))
        with contextlib.suppress(CheckpointError):
            found = load_sae(str(saved))
            assert found.cfg == before.cfg
            assert equal_saes(before, found)


def test_an_unknown_key_in_the_config_is_named(saved):
    edit(saved, lambda r: r["sae"].update(colour="red"))
    with pytest.raises(ConfigError, match="colour: unknown key"):
        load_sae(str(saved))


def test_places_without_an_sae_are_errors_that_say_what_was_expected(saved):
    with pytest.raises(StorageError, match="does not exist"):
        load_sae(str(saved / "nothing"))
    (saved / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no SAE"):
        load_sae(str(saved / "empty"))
    with pytest.raises(CheckpointError, match="is a file, expected"):
        load_sae(str(saved / "config.json"))
    with pytest.raises(CheckpointError, match="subtract_b_dec and scale are for SAEs of other pro"):
        load_sae(str(saved), subtract_b_dec=True, scale=2.0)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_sae(str(saved))
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        load_sae(str(saved))


# --- The hub ---------------------------------------------------------------------------------


def test_hub_names_are_checked_before_anything_is_downloaded():
    for name in ("hf-hub:", "hf-hub:org", "hf-hub:org//x"):
        with pytest.raises(CheckpointError, match="ORG/REPO"):
            load_sae(name)


def test_a_folder_of_a_hub_repository_is_loaded_from_the_hubs_cache(tmp_path, monkeypatch):
    """huggingface_hub finds a snapshot in its cache when it is offline: the real code path."""
    import huggingface_hub.constants as constants

    commit = "0" * 40
    repo = tmp_path / "models--org--saes"
    sae = make_sae(TopK(top_k=3))
    sae.save(str(repo / "snapshots" / commit / "layer11"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert equal_saes(sae, load_sae("hf-hub:org/saes/layer11"))
    with pytest.raises(CheckpointError, match="hf-hub:org/other"):
        load_sae("hf-hub:org/other")
    with pytest.raises(StorageError, match="does not exist"):
        load_sae("hf-hub:org/saes/layer12")


def hub_cache(tmp_path, monkeypatch):
    """A snapshot of org/saes in a cache of the hub, which is offline."""
    import huggingface_hub.constants as constants

    repo, commit = tmp_path / "models--org--saes", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = repo / "snapshots" / commit / "layer_23" / "run"
    folder.mkdir(parents=True)
    return folder


def test_a_file_of_a_hub_repository_is_loaded(tmp_path, monkeypatch):
    folder = hub_cache(tmp_path, monkeypatch)
    tensors = write_published(folder / "sae.pt", HEADERS["5-topk"][0], threshold=None)
    for name in ("layer_23/run/sae.pt", "layer_23/run"):
        assert torch.equal(load_sae(f"hf-hub:org/saes/{name}").W_enc, tensors["W_enc"])
    with pytest.raises(StorageError, match=r"hf-hub:org/saes/layer_23/sae\.pt: it does not exist"):
        load_sae("hf-hub:org/saes/layer_23/sae.pt")


@pytest.mark.parametrize(
    ("path", "fetched", "left"),
    [
        ("a/b/sae.pt", {"a/b/sae.pt"}, {"a/sae.pt", "a/b/other.bin", "c/x.json"}),
        ("a/b/ae.pt", {"a/b/ae.pt", "a/b/config.json"}, {"a/b/ae.pt.old"}),
        ("a/b", {"a/b/cfg.json", "a/b/c/sae.safetensors"}, {"a/bc/cfg.json", "cfg.json"}),
        ("", {"cfg.json", "a/b"}, set()),
    ],
)
def test_what_is_fetched_of_a_hub_repository(path, fetched, left, monkeypatch):
    """Which files, by the hub's own filter. There is no hub to ask here."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(repo, allow_patterns=None):
        asked.update(repo=repo, patterns=allow_patterns)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="no network"):
        load_sae(f"hf-hub:org/saes/{path}".rstrip("/"))
    found = filter_repo_objects(sorted(fetched | left), allow_patterns=asked["patterns"])
    assert asked["repo"] == "org/saes"
    assert set(found) == fetched


def test_an_sae_says_what_it_is():
    sae = SparseAutoencoder(SaeConfig(d_model=8, d_sae=16, activation=TopK(top_k=3)))
    assert repr(sae) == "SparseAutoencoder(top-k, top_k=3, d_model=8, d_sae=16)"
    sae.metadata["run_id"] = "0123"
    assert repr(sae).endswith("d_sae=16, run 0123)")
    # Where d_sae is given, the config's own exp_factor says nothing.
    assert sae.cfg.exp_factor == 2
    assert SparseAutoencoder(SaeConfig(d_model=8, d_sae=20)).cfg.d_sae == 20


def test_numpy_goes_in_where_tensors_do():
    sae = SparseAutoencoder(SaeConfig(d_model=4, d_sae=8, activation=TopK(top_k=2)))
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(0))
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    expected = sae(x)
    found = sae(x.numpy())
    torch.testing.assert_close(found.x_hat, expected.x_hat)
    acts = expected.acts.detach()
    torch.testing.assert_close(sae.decode(acts.double().numpy()), sae.decode(acts))
