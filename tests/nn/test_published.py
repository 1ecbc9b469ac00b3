"""Checkpoints of the published saev, of every schema. All files are written by the tests."""

import io
import json
import resource
import zipfile

import numpy as np
import pytest
import torch
from nn.small_saes import D, S, equal_saes, inputs

from saev.config import Relu
from saev.errors import CheckpointError, ConfigError
from saev.nn import load_sae

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
        (_v5("TopK", top_k=0), "top_k = 0, expected a positive integer"),
        (_v5("TopK", top_k=S + 1), "keeps 15 latents per token, but has only 14"),
        (_v5("BatchTopK", top_k=3, momentum="x"), "momentum = 'x'"),
        ({"schema": 4, "cfg": {"activation": {"cls": "TopK", "params": "x"}}}, "params = 'x', ex"),
        ({"schema": 4, "cfg": {"activation": "TopK"}}, "activation = 'TopK', expected an object"),
        ({"schema": 4, "cfg": "x"}, "cfg = 'x', expected an object"),
        ({"d_vit": "x", "exp_factor": 6 * 10**9}, "d_vit = 'x', expected a positive integer"),
        (
            {"d_vit": D, "exp_factor": 10**9},
            r"W_enc has .* expected \[6, 6000000000\]",
        ),
        ({"d_vit": D, "exp_factor": True}, "exp_factor = True, expected a positive integer"),
        ({"d_vit": D, "exp_factor": 2.5}, "exp_factor = 2.5, expected a positive integer"),
        ({"schema": True, "cfg": {}}, "schema True"),
        (
            {"schema": 5, "cfg": {"d_model": 9, "d_sae": S, "activation": TOPK}},
            r"W_enc has shape \[6, 14\], expected \[9, 14\]",
        ),
        ([1, 2], "a JSON header, then a state dict"),
    ],
)
def test_published_headers_that_cannot_be_read(header, message, tmp_path):
    write_published(tmp_path / "sae.pt", header)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path / "sae.pt"))


@pytest.mark.parametrize("header", ["[" * 100_000, '{"a":' * 100_000, "{" + " " * (2 << 20)])
def test_headers_that_are_too_deep_or_too_long(header, tmp_path):
    (tmp_path / "sae.pt").write_bytes(header.encode() + b"\n" + torch_file({}))
    with pytest.raises(CheckpointError, match=r"sae\.pt.*(not valid JSON|JSON header)"):
        load_sae(str(tmp_path))


def torch_file(tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def rewritten(archive: bytes, compression=zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """A zip archive with other contents in members whose names end so (_ for a dot)."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for member in old.infolist():
            key = member.filename.split("/")[-1].replace(".", "_")
            new.writestr(member.filename, members.get(key, old.read(member)))
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


class Big:
    """weights_only allows it, and it takes what it is told to take."""

    def __reduce__(self):
        return (bytearray, (6 * 10**9,))


def write_body(path, body: bytes):
    path.write_bytes(json.dumps(HEADERS["5-topk"][0]).encode() + b"\n" + body)


def test_published_files_that_are_truncated(tmp_path):
    path = tmp_path / "sae.pt"
    write_published(path, HEADERS["5-topk"][0])
    whole = path.read_bytes()
    for size in (0, 10, 600, len(whole) - 100):
        path.write_bytes(whole[:size])
        for url in (path, tmp_path):
            with pytest.raises(CheckpointError, match=r"sae\.pt"):
                load_sae(str(url))


def test_a_flipped_bit_of_a_published_file_is_found(tmp_path):
    tensors = write_published(tmp_path / "sae.pt", HEADERS["5-topk"][0], threshold=None)
    data = bytearray((tmp_path / "sae.pt").read_bytes())
    at = data.index(tensors["W_dec"].numpy().tobytes())
    for offset in (0, 5, 4 * S * D - 1):
        damaged = bytearray(data)
        damaged[at + offset] ^= 1
        (tmp_path / "sae.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"archive/data/\d has another checksum"):
            load_sae(str(tmp_path))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (torch_file({"W_enc": Evil()}), r"refers to (__builtin__|builtins)\.print.*state_dict\(\)"),
        (torch_file({"W_enc": Big()}), r"refers to (__builtin__|builtins)\.bytearray"),
        (torch_file([torch.zeros(3)]), "it holds one list"),
        (torch_file({"W_enc": {"a": torch.zeros(3)}}), "'W_enc' is a dict, expected a tensor"),
        (
            torch_file({"W_enc": torch.zeros(()).expand(10**5, 10**5)}),
            r"shape \[100000, ",
        ),
        (torch_file({"W_enc": torch.zeros(3).to_sparse()}), "refers to torch"),
        (rewritten(torch_file({}), zipfile.ZIP_DEFLATED), "claims to hold"),
        (rewritten(torch_file({}), data_pkl=b"\x80\x02}c__main__\nX\n."), "refers to __main__.X"),
        (b"\x80\x02}q\x00.", "of a torch before 1.6"),
        (torch_file({"W_enc": torch.zeros(3)}), "lacks W_dec, b_dec, b_enc; it has W_enc"),
    ],
    ids="code bytearray list nested expanded sparse compressed global legacy missing".split(),
)
def test_published_files_that_are_hostile(body, message, tmp_path, capsys):
    write_body(tmp_path / "sae.pt", body)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": torch.zeros(3)}, "has surprise beside W_dec, W_enc, b_dec, b_enc"),
        ({"b_dec": torch.zeros(D + 1)}, r"b_dec has shape \[7\], expected \[6\]"),
        ({"W_dec": torch.zeros(S, D, 1)}, r"W_dec has shape \[14, 6, 1\], expected \[14, 6\]"),
        ({"b_enc": torch.zeros(S, dtype=torch.int)}, "b_enc is of torch.int32, expected a float"),
        ({"b_enc": torch.full((S,), torch.nan)}, "b_enc has values that are not a number"),
    ],
)
def test_published_tensors_that_do_not_fit(change, message, tmp_path):
    tensors = write_published(tmp_path / "sae.pt", HEADERS["5-topk"][0], threshold=None)
    write_body(tmp_path / "sae.pt", torch_file(tensors | change))
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))


# --- Centred and scaled input ------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [None, "npy", "pt"])
def test_an_sae_of_scaled_activations_takes_them_as_recorded(as_file, tmp_path):
    """osunlp's DINOv2 SAE saw (x - mean) / 2.018, with an encoder that subtracts b_dec, or not."""
    mean, norm = torch.randn(D, generator=torch.Generator().manual_seed(8)) * 3, 2.0181241
    tensors = write_published(tmp_path / "sae.pt", HEADERS["none"][0], threshold=None, n=2 * D)
    centre = mean
    if as_file == "npy":
        np.save(tmp_path / "mean.npy", mean.numpy())
    if as_file == "pt":
        torch.save(mean, tmp_path / "mean.pt")
    if as_file:
        centre = str(tmp_path / f"mean.{as_file}")
    x = inputs()
    for subtract in (False, True):
        y_hat, f = published_forward(tensors, Relu(), (x - mean) / norm, subtract)
        sae = load_sae(
            str(tmp_path / "sae.pt"), subtract_b_dec=subtract, centre=centre, scale=1 / norm
        )
        out = sae(x)
        torch.testing.assert_close(out.acts, f, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.x_hat, y_hat * norm + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "warns"), [("none", True), ("1a-topk", True), ("3", False)])
def test_files_whose_input_may_have_been_scaled_warn(name, warns, tmp_path, caplog):
    path = tmp_path / "sae.pt"
    write_published(path, HEADERS[name][0], threshold=None, n=2 * D)
    load_sae(str(path), scale=2.0)
    assert "centre" not in caplog.text
    load_sae(str(path))
    assert ("osunlp's DINOv2 SAE needs `centre` and `scale`" in caplog.text) == warns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"centre": torch.zeros(7)}, ConfigError, r"centre has shape \[7\], expected \[6\]"),
        ({"scale": 0.0}, ConfigError, "scale is 0.0"),
        ({"scale": float("nan")}, ConfigError, "scale is nan"),
        ({"top_k": 3}, CheckpointError, "top_k is for SAEs of overcomplete, but .* published saev"),
        ({"top_k": 0}, ConfigError, "top_k is 0"),
        ({"top_k": 2.5}, ConfigError, "top_k is 2.5"),
        ({"scale": "2"}, ConfigError, "scale is '2'"),
        (
            {"centre": torch.full((D,), torch.nan)},
            ConfigError,
            "centre has values that are not fin",
        ),
    ],
)
def test_options_that_do_not_fit(options, error, message, tmp_path):
    write_published(tmp_path / "sae.pt", HEADERS["5-topk"][0], threshold=None)
    with pytest.raises(error, match=message):
        load_sae(str(tmp_path), **options)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x93NUMPY", torch_file({"mean": torch.zeros(D)}), torch_file(torch.zeros(D, 1)), b"x"],
)
def test_vectors_that_cannot_be_read(content, tmp_path):
    write_published(tmp_path / "sae.pt", HEADERS["5-topk"][0], threshold=None)
    (tmp_path / "mean").write_bytes(content)
    with pytest.raises(CheckpointError, match="mean"):
        load_sae(str(tmp_path), centre=str(tmp_path / "mean"))
