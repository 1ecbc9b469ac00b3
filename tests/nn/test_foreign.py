"""SAEs of other projects: what is folded, and what is refused. tests/interop has the real ones."""

import contextlib
import json
import random
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from nn.small_saes import D, S, inputs, make_sae
from nn.test_published import write_published

from saev.config import BatchTopK, JumpRelu, Relu, TopK
from saev.errors import CheckpointError
from saev.nn import load_sae, load_saelens, to_saelens

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
    stored = safetensors.torch.load_file(tmp_path / "sparsity.safetensors")
    assert torch.allclose(stored["sparsity"], torch.log10(frequency + 1e-10))
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
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
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


SIX = {"metadata": {"sae_lens_version": "6.54.12"}}
V3 = {"finetuning_scaling_factor": True, "prepend_bos": True, "sae_lens_training_version": "3.0.0"}


def standard(w, x, act=torch.relu, subtract=True):
    """What SAELens computes, written out."""
    f = act((x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"])
    return f, f @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("version", [{}, SIX], ids=["before six", "six"])
def test_a_missing_apply_b_dec_to_input_means_true(version, tmp_path):
    w = write_saelens(tmp_path, {"architecture": "standard"} | version)
    f, x_hat = standard(w, inputs())
    out = load_sae(str(tmp_path))(inputs())
    torch.testing.assert_close(out.acts, f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-4, atol=1e-4)


def test_negative_thresholds_let_no_negative_value_through(tmp_path):
    theta = torch.linspace(-2, 2, S)
    w = write_saelens(tmp_path, SIX | {"architecture": "jumprelu"}, threshold=theta)
    f, _ = standard(w, inputs(), lambda z: z.relu() * (z > theta))
    out = load_sae(str(tmp_path)).encode(inputs())
    assert out.acts.min() == 0
    torch.testing.assert_close(out.acts, f, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [False, None, "none"])
def test_spellings_of_no_normalization(value, tmp_path):
    write_saelens(tmp_path, {"normalize_activations": value})
    assert load_sae(str(tmp_path)).cfg.activation == Relu()


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_finetuned_factors_are_folded_into_the_decoder(name, tmp_path):
    factor = torch.linspace(0.5, 2, S)
    w = write_saelens(tmp_path, V3, **{name: factor})
    f, x_hat = standard(w | {"W_dec": w["W_dec"] * factor[:, None]}, inputs())
    out = load_sae(str(tmp_path))(inputs())
    torch.testing.assert_close(out.acts, f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "tensors", "message"),
    [
        ({}, {"surprise": torch.zeros(3)}, "has surprise beside W_dec, W_enc, b_dec, b_enc"),
        ({}, {"threshold": torch.zeros(S)}, "has threshold beside"),
        ({}, {"scaling_factor": torch.full((S,), 2.0)}, "does not say that they are used"),
        (V3, {"scaling_factor": torch.ones(S + 1)}, r"scaling_factor has shape \[15\], expected"),
        ({}, {"b_enc": torch.zeros(S, dtype=torch.long)}, "b_enc is of torch.int64, expected a"),
        ({}, {"W_dec": torch.full((S, D), torch.nan)}, "W_dec has values that are not a number"),
    ],
)
def test_tensors_that_nobody_asked_for_are_not_dropped(cfg, tensors, message, tmp_path):
    write_saelens(tmp_path, cfg, **tensors)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))


def test_flags_about_training_are_no_obstacle(tmp_path):
    flags = "prepend_bos use_ghost_grads use_sparse_activations is_dataset_tokenized".split()
    write_saelens(tmp_path, dict.fromkeys(flags, True))
    assert load_sae(str(tmp_path)).d_sae == S


def test_a_gated_sae_is_a_jumprelu_sae(tmp_path):
    g = torch.Generator().manual_seed(6)
    gates = {name: torch.randn(S, generator=g) for name in ("b_gate", "b_mag", "r_mag")}
    w = write_saelens(tmp_path, SIX | {"architecture": "gated"}, b_enc=None, **gates)
    x = inputs() - w["b_dec"]
    gate = x @ w["W_enc"] + w["b_gate"] > 0
    f = gate * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    sae = load_sae(str(tmp_path))
    assert sae.cfg.activation.kind == "jump-relu"
    torch.testing.assert_close(sae(inputs()).acts, f, rtol=1e-4, atol=1e-4)
    theta = (gates["b_mag"] - gates["r_mag"].exp() * gates["b_gate"]).clamp(min=0)
    torch.testing.assert_close(sae.threshold, theta)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}" + " " * (2 << 20), "[]", "{", "\udcff"])
def test_configs_that_are_damaged_or_hostile(text, tmp_path):
    write_saelens(tmp_path, {})
    (tmp_path / "cfg.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"cfg\.json (is not|has \d+ bytes)"):
        load_sae(str(tmp_path))


@pytest.mark.parametrize("at", [0, 3, 9, 40, 100])
def test_damaged_weights(at, tmp_path):
    write_saelens(tmp_path, {})
    path = tmp_path / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="safetensors"):
        load_sae(str(tmp_path))
    path.write_bytes(data[:at])
    with pytest.raises(CheckpointError, match="safetensors"):
        load_sae(str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {"architecture": "gated"},
            "lacks b_gate, b_mag, r_mag; it has W_dec, W_enc",
        ),
        (
            {"architecture": "of tomorrow"},
            "architecture 'of tomorrow'.*: saev knows standard",
        ),
        ({"architecture": ["topk"]}, "architecture .*topk.*cannot be imported"),
        ({"architecture": "topk", "k": S + 1}, "keeps 15 latents per token, but has only 14"),
        ({"architecture": "topk", "k": 2.5}, "k = 2.5, expected a positive integer"),
        ({"architecture": "topk"}, "k = None"),
        ({"architecture": "jumprelu"}, "lacks.*threshold"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"d_in": 5}, r"W_enc has shape \[6, 14\], expected \[5, 14\]"),
        ({"d_in": "x"}, "d_in = 'x', expected a positive integer"),
        ({"d_sae": 6 * 10**9}, r"W_enc has shape .* expected \[6, 6000000000\]"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn = 'tanh-relu'"),
        ({"activation_fn_kwargs": "x"}, "activation_fn_kwargs = 'x', expected an object"),
        ({"hook_name": "blocks.1.attn.hook_z"}, "reshape_activations = 'hook_z'"),
        ({"metadata": "x"}, "metadata = 'x', expected an object"),
        ({"metadata": {"sae_lens_version": "x"}}, "sae_lens_version = 'x', not a version"),
        ({"rescale_acts_by_decoder_norm": True}, "has rescale_acts_by_decoder_norm = true, which"),
        ({"use_error_term": True, "x": True}, "has use_error_term = true, x = true, which an SAE"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input = 'no', expected true or false"),
        (
            SIX | {"architecture": "topk", "k": 3, "finetuning_scaling_factor": True},
            "has finetuning_scaling_factor = true, which",
        ),
        ({"finetuning_scaling_factor": True}, "lacks finetuning_scaling_factor, which cfg.json"),
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


# --- sparsify ----------------------------------------------------------------------------------


def write_sparsify(path, **cfg):
    g = torch.Generator().manual_seed(4)
    weights = {
        "encoder.weight": torch.randn(S, D, generator=g),
        "encoder.bias": torch.randn(S, generator=g),
        "W_dec": torch.randn(S, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    cfg = {"d_in": D, "num_latents": S, "k": 3} | cfg
    (path / "cfg.json").write_text(json.dumps(cfg))
    (path / "sae.safetensors").write_bytes(safetensors.torch.save(weights))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"signed": True}, "signed = true, which cannot be imported: it keeps the values of larg"),
        ({"surprise": True}, "has surprise = true, which an SAE of saev cannot express"),
        ({"k": S + 1}, "keeps 15 latents per token, but has only 14"),
        ({"num_latents": 6 * 10**9}, r"expected \[6000000000, 6\]"),
        ({"num_latents": "x"}, "num_latents = 'x'"),
        ({"num_latents": 0, "expansion_factor": 10**9}, r"expected \[6000000000, 6\]"),
        ({"num_latents": 0}, "expansion_factor = None"),
        ({"d_in": None}, "d_in = None"),
    ],
)
def test_sparsify_folders_that_cannot_be_read(cfg, message, tmp_path):
    write_sparsify(tmp_path, **cfg)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))


# --- Gemma Scope -------------------------------------------------------------------------------

ARRAYS = {
    "W_enc": np.ones((D, S), np.float32),
    "b_enc": np.ones(S, np.float32),
    "W_dec": np.ones((S, D), np.float32),
    "b_dec": np.ones(D, np.float32),
    "threshold": np.ones(S, np.float32),
}


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


LYING = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 1000000000)}"
OBJECTS = "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
NEGATIVE = "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (
            npy(LYING),
            r"W_enc .*shape \[6, 1000000000\] of float32 needs 24000000000 bytes, but 0 are",
        ),
        (npy(OBJECTS, b"\x80\x04."), "W_enc .*has dtype object, expected numbers"),
        (npy(NEGATIVE, b"\0" * 16), r"shape \[-1, -4\]"),
        (npy("__import__('os')"), "W_enc is not an npy array"),
        (npy("(" * 5000), "W_enc is not an npy array"),
        (b"\x93NUMPY\x09\x00", "npy version"),
        (b"", "W_enc is not an npy array"),
        (npy(LYING.replace("(6, 1000000000)", "(2,)"), b"\0" * 8), r"W_enc has shape \[2\], exp"),
        (npy(LYING.replace("<f4", "<i4").replace("000000000", ""), b"\0" * 24), "of torch.int32"),
    ],
    ids="lies objects negative code deep version empty shape integers".split(),
)
def test_arrays_that_are_damaged_or_hostile(member, message, tmp_path):
    np.savez(tmp_path / "params.npz", **{n: a for n, a in ARRAYS.items() if n != "W_enc"})
    with zipfile.ZipFile(tmp_path / "params.npz", "a") as archive:
        archive.writestr("W_enc.npy", member)
    for url in (tmp_path, tmp_path / "params.npz"):
        with pytest.raises(CheckpointError, match=message):
            load_sae(str(url))


def test_archives_that_are_damaged_or_hostile(tmp_path):
    path = tmp_path / "params.npz"
    np.savez(path, **ARRAYS, b_gate=np.ones(S))
    with pytest.raises(CheckpointError, match="has b_gate beside W_dec, W_enc"):
        load_sae(str(path))
    np.savez(path, **ARRAYS)
    data = path.read_bytes()
    for size in (2, 100, len(data) - 30):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is not an npz file"):
            load_sae(str(path))
    np.savez_compressed(path, **ARRAYS | {"W_enc": np.zeros((1000, 10_000), np.float32)})
    with pytest.raises(CheckpointError, match=r"its arrays claim 4000\d+\. Weights do not"):
        load_sae(str(path))


# --- State dicts -------------------------------------------------------------------------------


def linear(**extra):
    return {
        "encoder.weight": torch.ones(S, D),
        "encoder.bias": torch.ones(S),
        "decoder.weight": torch.ones(D, S),
    } | extra


TOPK = linear(b_dec=torch.ones(D), k=torch.tensor(3), threshold=torch.tensor(-1.0))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (TOPK, None, "of AutoEncoderTopK and of BatchTopKSAE, which encode in different ways"),
        (TOPK, {"trainer": {"dict_class": "CrossCoder"}}, "'CrossCoder', which saev reads as Auto"),
        (
            TOPK,
            {"trainer": {"dict_class": "AutoEncoder"}},
            "is a AutoEncoder, whose tensors are",
        ),
        (TOPK, {"trainer": "x"}, "trainer = 'x', expected an object"),
        (
            TOPK | {"k": torch.tensor(S + 1)},
            {"trainer": {"dict_class": "AutoEncoderTopK"}},
            "keeps 15 latents per token, but has only 14",
        ),
        (
            TOPK | {"k": torch.tensor([1, 2])},
            {"trainer": {"dict_class": "BatchTopKSAE"}},
            r"k = \[1, 2\], expected a positive integer",
        ),
        (linear(bias=torch.ones(D + 1)), None, r"bias has shape \[7\], expected \[6\]"),
        (linear(surprise=torch.ones(D)), None, "of no class of dictionary_learning"),
    ],
)
def test_dictionaries_that_cannot_be_read(tensors, config, message, tmp_path):
    torch.save(tensors, tmp_path / "ae.pt")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))


OVERCOMPLETE = {
    "encoder.final_block.0.weight": torch.ones(S, D),
    "encoder.final_block.0.bias": torch.ones(S),
    "dictionary._weights": torch.nn.functional.normalize(torch.ones(S, D)),
    "dictionary.multiplier": torch.tensor(0.0),
}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {}, r"Give it as `top_k`: TopKSAE's default is d_sae // 10 = 1; .* is d_sae = 14"),
        ({}, {"top_k": S + 1}, "keeps 15 latents per token, but has only 14"),
        ({"thresholds": torch.ones(S)}, {"top_k": 3}, "is of a JumpSAE, which has no top_k"),
        ({"surprise": torch.ones(S)}, {"top_k": 3}, "has surprise beside"),
        ({"dictionary._weights": torch.ones(S, D)}, {"top_k": 3}, "norms from 2.45 to 2.45. Only"),
    ],
)
def test_state_dicts_of_overcomplete_that_cannot_be_read(change, options, message, tmp_path):
    torch.save(OVERCOMPLETE | change, tmp_path / "sae.pth")
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path / "sae.pth"), **options)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (linear(pre_bias=torch.ones(D), latent_bias=torch.ones(S)), "OpenAI's sparse_autoencoder"),
        ({"W_enc": torch.ones(2), "b_enc": 0, "W_dec": 0, "b_dec": 0}, "expected a tensor"),
        ({"x": torch.ones(2)}, "a state dict of an unknown kind, with x"),
    ],
)
def test_state_dicts_of_nobody_here(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "some.pt")
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path / "some.pt"))


# --- Folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["shards.json", "metadata.json"], "It seems to hold the activations of saev shards"),
        (["config.json", "model.safetensors"], "It seems to hold a model of transformers"),
        (["params.safetensors", "config.json"], "It seems to hold an SAE of Gemma Scope 2"),
        (["weights.pt", "config.json"], "It seems to hold an SAE of ViT-Prisma"),
        (["cfg.json"], "the config of an SAE of SAELens or sparsify without its weights"),
        (["resume"], "a run of saev that is not finished"),
        (["topk.pth", "notes.md"], r"If one of topk\.pth is an SAE, give that file"),
        (["layer.3/cfg.json", "layer.3/sae.safetensors"], r"hold SAEs: give one of layer\.3"),
        (["notes.md"], "If it is a run, it is not finished"),
    ],
)
def test_a_folder_without_an_sae_says_whose_it_seems_to_be(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"holds no SAE: expected .*{message}"):
        load_sae(str(tmp_path))


def write_any(kind: str, path) -> str:
    """A sound SAE of that kind, and what to load."""
    if kind == "saelens":
        write_saelens(path, SIX | {"architecture": "topk", "k": 3})
    elif kind == "sparsify":
        write_sparsify(path)
    elif kind == "gemma-scope":
        np.savez(path / "params.npz", **ARRAYS)
    elif kind == "dictionary_learning":
        torch.save(TOPK, path / "ae.pt")
        (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    else:
        write_published(path / "sae.pt", {"schema": 5, "cfg": {"d_model": D, "d_sae": S}}, n=S)
    return str(path)


@pytest.mark.parametrize(
    "kind", ["saelens", "sparsify", "gemma-scope", "dictionary_learning", "published"]
)
def test_whatever_is_damaged_ends_in_one_sentence(kind, tmp_path, caplog):
    """Bits, bytes and lengths, more of them where headers are. No format of others has a checksum,
    so a damage may also give other values."""
    caplog.set_level("ERROR")
    url = write_any(kind, tmp_path)
    load_sae(url)
    rng = random.Random(kind)
    for path in sorted(tmp_path.iterdir()):
        sound = path.read_bytes()
        for _ in range(60):
            data = bytearray(sound)
            at = rng.randrange(min(len(data), rng.choice((100, 1000, len(data)))))
            match rng.randrange(3):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
                case 2:
                    del data[at:]
            path.write_bytes(data)
            with contextlib.suppress(CheckpointError):  # anything else is a traceback
                load_sae(url)
        path.write_bytes(sound)
