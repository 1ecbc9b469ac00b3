"""Saving, loading, folding, and other people's formats. All files are written by the tests."""

import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch

import saev
from saev import storage
from saev.config import BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.errors import CheckpointError, ConfigError, StorageError
from saev.nn import SparseAutoencoder, fold_normalization, load_sae, load_saelens, to_saelens
from saev.nn.saelens import load_sparsity

D, S = 6, 14
ACTIVATIONS = [
    Relu(),
    TopK(top_k=3),
    TopK(top_k=13, rectify=False),
    BatchTopK(top_k=3),
    JumpRelu(),
]
IDS = ["relu", "top-k", "signed-top-k", "batch-top-k", "jump-relu"]


def make_sae(act, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(D, S, generator=g),
        "b_enc": torch.randn(S, generator=g) * 0.3,
        "W_dec": torch.nn.functional.normalize(torch.randn(S, D, generator=g), dim=1),
        "b_dec": torch.randn(D, generator=g),
    }
    if act.kind == "batch-top-k":
        tensors["threshold"] = torch.tensor(0.8)
    if act.kind == "jump-relu":
        tensors["threshold"] = torch.rand(S, generator=g)
    return SparseAutoencoder.from_tensors(SaeConfig(d_model=D, d_sae=S, activation=act), tensors)


def inputs(n=40):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(5)) * 2 + 1


def equal_saes(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


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
    first = {u: storage.read_bytes(u) for u in storage.find(url)}
    loaded.save(url, metadata={"layer": 11})
    assert {u: storage.read_bytes(u) for u in storage.find(url)} == first
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
    with pytest.raises(CheckpointError, match=r"sae\.safetensors has checksum .* expected"):
        load_sae(str(saved))


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_an_error(saved, size):
    weights = saved / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"bytes, expected .*truncated"):
        load_sae(str(saved))


def edit(saved, change):
    record = json.loads((saved / "config.json").read_text())
    change(record)
    (saved / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["sae"].update(d_model=7), r"W_enc has shape \[6, 14\], expected \[7, 14\]"),
        (lambda r: r["sae"].update(d_sae=15), r"expected \[6, 15\]"),
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
    with pytest.raises(CheckpointError, match="subtract_b_dec"):
        load_sae(str(saved), subtract_b_dec=True)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_sae(str(saved))
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        load_sae(str(saved))


# --- The published saev ----------------------------------------------------------------------

SHAPES_V5 = {"d_model": D, "d_sae": S, "reinit_blend": 0.8, "reinit_enc_dec_tranpose": True}
SPARSITY = {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}
AUX = {"cls": "AuxK", "params": {"key": "auxk", "k_aux": 512, "alpha": 0.03125}}
V5 = {"key": "top-k", "sparsity": SPARSITY, "aux": AUX}


def _v5(cls, **params):
    cfg = SHAPES_V5 | {"activation": {"cls": cls, "params": V5 | params}}
    return {"schema": 5, "cfg": cfg, "commit": "abc", "lib": "0.1"}


OLD = {"d_vit": D, "exp_factor": 2, "n_reinit_samples": 524288, "seed": 3}
TOPK = {"cls": "TopK", "params": {"top_k": 3}}
BTK = {"cls": "BatchTopK", "params": {"top_k": 3, "momentum": 0.1}}
HEADERS = {
    "none": (OLD | {"sparsity_coeff": 4e-4, "ghost_grads": False}, Relu()),
    "1a-relu": ({"schema": 1, "cls": "Relu", "cfg": OLD}, Relu()),
    "1a-topk": ({"schema": 1, "cls": "TopK", "cfg": OLD | {"top_k": 3}}, TOPK),
    "1b": (
        {"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": OLD | {"activation": TOPK}},
        TOPK,
    ),
    "1b-default": ({"schema": 1, "cfg": OLD}, Relu()),
    "2-old-batch-topk": (
        {"schema": 2, "cfg": OLD | {"activation": {"cls": "BatchTopK", "params": {"top_k": 3}}}},
        TOPK,
    ),
    "3": ({"schema": 3, "cfg": {"d_model": D, "exp_factor": 2, "activation": TOPK}}, TOPK),
    "4": ({"schema": 4, "cfg": SHAPES_V5 | {"activation": BTK}}, BTK),
    "4-flat-sparsity": (
        {
            "schema": 4,
            "cfg": SHAPES_V5
            | {"activation": {"cls": "Relu", "params": {"sparsity": {"coeff": 4e-4}}}},
        },
        Relu(),
    ),
    "5-relu": (_v5("Relu"), Relu()),
    "5-topk": (_v5("TopK", top_k=3), TOPK),
    "5-batch-topk": (_v5("BatchTopK", top_k=3, momentum=0.1), BTK),
}


def write_published(path, header, dtype=torch.float32, threshold=0.7, n=S):
    g = torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(D, n, generator=g),
        "b_enc": torch.randn(n, generator=g),
        "W_dec": torch.randn(n, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    if threshold is not None:
        tensors["activation.threshold"] = torch.tensor(threshold)
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(tensors, file)
    return tensors


def published_forward(tensors, want, x, subtract=False):
    """What the published code computes at evaluation, for each activation."""
    z = (x - tensors["b_dec"] if subtract else x) @ tensors["W_enc"] + tensors["b_enc"]
    if want is TOPK:
        top = z.topk(3, dim=-1)
        f = torch.zeros_like(z).scatter(-1, top.indices, top.values)
    elif want is BTK:
        f = torch.where(z > tensors["activation.threshold"], z, 0.0)
    else:
        f = z.relu()
    return f @ tensors["W_dec"] + tensors["b_dec"], f


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("name", HEADERS)
def test_published_checkpoints_of_every_schema(name, subtract, tmp_path):
    header, want = HEADERS[name]
    n = header.get("cfg", header).get("d_sae", 2 * D)
    path = tmp_path / "checkpoint" / "sae.pt"
    path.parent.mkdir()
    threshold = 0.7 if want is BTK else None
    tensors = write_published(path, header, threshold=threshold, n=n)
    x = inputs()
    x_hat, f = published_forward(tensors, want, x, subtract)
    for url in (path, path.parent, tmp_path):
        sae = load_sae(str(url), subtract_b_dec=subtract)
        out = sae(x)
        torch.testing.assert_close(out.acts, f, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-4, atol=1e-4)
    sae.save(str(tmp_path / "again"))
    assert equal_saes(sae, load_sae(str(tmp_path / "again")))
    if want is BTK:
        assert sae.cfg.activation.threshold_momentum == pytest.approx(0.9)


def test_published_half_precision_and_untrained_thresholds(tmp_path):
    path = tmp_path / "sae.pt"
    write_published(path, HEADERS["5-batch-topk"][0], dtype=torch.bfloat16, threshold=-1.0)
    sae = load_sae(str(path))
    assert sae.W_enc.dtype == torch.float32
    assert sae.threshold.item() == 0  # its evaluation is then a ReLU


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"schema": 6, "cfg": {}}, "schema 6"),
        (_v5("AbsBatchTopK", top_k=3), "AbsBatchTopK"),
        (_v5("TopK", top_k=0), "top_k 0"),
        (
            {"schema": 5, "cfg": {"d_model": 9, "d_sae": S, "activation": TOPK}},
            "d_model 9, but W_enc has 6",
        ),
        ([1, 2], "not a JSON header"),
    ],
)
def test_published_headers_that_cannot_be_read(header, message, tmp_path):
    write_published(tmp_path / "sae.pt", header)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path / "sae.pt"))


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_published_files_that_are_damaged_or_hostile(tmp_path, capsys):
    path = tmp_path / "sae.pt"
    write_published(path, HEADERS["5-topk"][0])
    whole = path.read_bytes()
    for size in (0, 10, 600, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"sae\.pt"):
            load_sae(str(path))
    buffer = io.BytesIO()
    torch.save({"W_enc": Evil()}, buffer)
    path.write_bytes(json.dumps(HEADERS["5-topk"][0]).encode() + b"\n" + buffer.getvalue())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_sae(str(path))
    assert "executed" not in capsys.readouterr().out


# --- SAELens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "architecture", "back"),
    [
        (Relu(), "standard", "relu"),
        (TopK(top_k=3), "topk", "top-k"),
        (BatchTopK(top_k=3), "jumprelu", "jump-relu"),
        (JumpRelu(), "jumprelu", "jump-relu"),
    ],
    ids=lambda v: getattr(v, "kind", None),
)
def test_saelens_round_trip(act, architecture, back, tmp_path):
    sae, frequency = make_sae(act), torch.linspace(0, 1, S)
    to_saelens(sae, str(tmp_path), {"model_name": "dinov2", "hook_name": "blocks.11"}, frequency)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == architecture
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (D, S, "float32")
    assert cfg["apply_b_dec_to_input"] is False
    assert cfg["normalize_activations"] == cfg["reshape_activations"] == "none"
    assert cfg["metadata"]["model_name"] == "dinov2"
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg.get("k") == (3 if act.kind == "top-k" else None)
    tensors = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "W_enc": (D, S),
        "b_enc": (S,),
        "W_dec": (S, D),
        "b_dec": (D,),
    } | ({"threshold": (S,)} if architecture == "jumprelu" else {})
    assert torch.allclose(load_sparsity(str(tmp_path)), torch.log10(frequency + 1e-10))
    again = load_sae(str(tmp_path))
    assert again.cfg.activation.kind == back
    assert torch.equal(again(inputs()).acts, sae(inputs()).acts)
    assert torch.equal(again(inputs()).x_hat, sae(inputs()).x_hat)


def write_saelens(path, cfg, **tensors):
    g = torch.Generator().manual_seed(4)
    weights = {
        "W_enc": torch.randn(D, S, generator=g),
        "b_enc": torch.randn(S, generator=g),
        "W_dec": torch.randn(S, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    } | tensors
    (path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": S} | cfg))
    (path / "sae_weights.safetensors").write_bytes(safetensors.torch.save(weights))
    return weights


def test_saelens_input_bias_and_decoder_norms_are_folded(tmp_path):
    cfg = {
        "architecture": "topk",
        "k": 4,
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": True,
    }
    w = write_saelens(tmp_path, cfg)
    x, norm = inputs(), w["W_dec"].norm(dim=1)
    z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    top = z.topk(4, dim=-1)
    f = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
    x_hat = (f / norm) @ w["W_dec"] + w["b_dec"]
    out = load_saelens(str(tmp_path))(x)
    torch.testing.assert_close(out.acts, f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-4, atol=1e-4)


def test_saelens_before_version_six(tmp_path):
    cfg = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 2},
    }
    write_saelens(tmp_path, cfg)
    assert load_sae(str(tmp_path)).cfg.activation == TopK(top_k=2)
    assert load_sparsity(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "gated"}, "gated"),
        ({"architecture": "topk"}, "k = None"),
        ({"architecture": "jumprelu"}, "lacks.*threshold"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"d_in": 5}, r"W_enc has shape \[6, 14\], expected \[5, 14\]"),
        ({"d_in": "x"}, "lacks d_in"),
    ],
)
def test_saelens_folders_that_cannot_be_read(cfg, message, tmp_path):
    write_saelens(tmp_path, cfg)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))


def test_saelens_export_refuses_what_it_cannot_express(tmp_path):
    with pytest.raises(CheckpointError, match="negative"):
        to_saelens(make_sae(TopK(top_k=3, rectify=False)), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"frequency.*\[3\]"):
        to_saelens(make_sae(Relu()), str(tmp_path), frequency=torch.zeros(3))
    assert not (tmp_path / "cfg.json").exists()


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
