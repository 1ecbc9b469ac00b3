"""Weights in a file without a tag: which activation function and preprocessing they get."""

import logging
import typing as tp
from pathlib import Path

import open_clip
import pytest
import timm
import torch

from saev import vit
from saev.vit import checkpoints, open_clip_models, timm_models

SCALARS = {
    "input_resolution": torch.tensor(224),
    "context_length": torch.tensor(77),
    "vocab_size": torch.tensor(49408),
}
"""What OpenAI's archives hold beside the weights (openai/CLIP, clip/model.py, build_model)."""


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


class Reference(tp.NamedTuple):
    """An image tower as open_clip builds it with QuickGELU, and its weights in OpenAI's layout."""

    visual: tp.Any
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def small() -> Reference:
    """Of an architecture without any tag: only the file's own tensors tell."""
    torch.manual_seed(0)
    model: tp.Any = open_clip.create_model("ViT-S-32", force_quick_gelu=True)
    half = {f"visual.{k}": t.half() for k, t in model.visual.state_dict().items()}
    model.visual.load_state_dict({k.removeprefix("visual."): t for k, t in half.items()})
    return Reference(model.visual.eval(), half)


def gelu(model: tp.Any) -> str:
    return type(model.module.transformer.resblocks[0].mlp.gelu).__name__


def same(model: vit.VisionModel, reference: tp.Any) -> bool:
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        return torch.allclose(model.pool(images), reference(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_openai_s_own_tensors_show_quickgelu(prefix: str, small: Reference, tmp_path: Path) -> None:
    torch.save({prefix + k: t for k, t in (small.state | SCALARS).items()}, tmp_path / "o.pt")
    model = vit.load("clip", f"ViT-S-32@{tmp_path / 'o.pt'}")
    assert (gelu(model), model.network, model.network_before) == (
        "QuickGELU", "ViT-S-32-quickgelu", "ViT-S-32",
    )  # fmt: skip
    assert same(model, small.visual)


def test_without_them_the_architecture_decides(
    small: Reference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(small.state, tmp_path / "o.pt")
    model = vit.load("clip", f"ViT-S-32@{tmp_path / 'o.pt'}")
    assert (gelu(model), model.network, model.network_before) == ("GELU", "ViT-S-32", None)
    assert not same(model, small.visual)
    assert not warned(caplog)  # no tag, so nothing is known that could be said


@pytest.mark.slow
def test_timm_s_networks_follow_the_same_marks(tmp_path: Path) -> None:
    """timm's own name of the network gives the same activations, and GELU gives others."""
    torch.manual_seed(0)
    reference: tp.Any = open_clip.create_model("ViT-B-32", force_quick_gelu=True)
    state = {f"visual.{k}": t for k, t in reference.visual.state_dict().items()}
    torch.save(state | SCALARS, tmp_path / "o.pt")
    model = vit.load("timm", f"vit_base_patch32_clip_224@{tmp_path / 'o.pt'}")
    assert model.network == "vit_base_patch32_clip_quickgelu_224"
    assert model.network_before == "vit_base_patch32_clip_224"
    clip = vit.load("clip", f"ViT-B-32@{tmp_path / 'o.pt'}")
    images = torch.randn(2, 3, 224, 224)
    expected = clip.record(images, [3, -1])
    torch.testing.assert_close(model.record(images, [3, -1]), expected, rtol=1e-3, atol=1e-3)
    assert model.spec.mean == clip.spec.mean
    named = vit.load("clip", f"ViT-B-32/openai@{tmp_path / 'o.pt'}")
    assert torch.equal(named.record(images, [-1]), expected[1:])
    assert (named.network, named.weights) == (clip.network, clip.weights)


def left(arch: str, tag: str | None = None, names: tp.Iterable[str] = ()) -> tp.Any:
    tensors = dict.fromkeys(names, torch.zeros(()))
    return open_clip_models._choose(arch, tag, checkpoints.Weights("URL", tensors, {}, ""))


def test_tags_that_agree_decide(caplog: pytest.LogCaptureFixture) -> None:
    """open_clip has one tag of ViT-L-14-336, OpenAI's, and its config says GELU."""
    assert "quick_gelu" not in (open_clip.get_model_config("ViT-L-14-336") or {})
    choice = left("ViT-L-14-336")
    assert (choice.config["quick_gelu"], choice.mistaken) == (True, True)
    choice = left("ViT-g-14")  # all of LAION's
    assert (choice.config["quick_gelu"], choice.mistaken) == (False, False)
    assert left("ViT-B-32-quickgelu").config["quick_gelu"]
    assert not left("ViT-B-32-quickgelu").mistaken
    assert not warned(caplog)


def test_tags_that_disagree_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        choice = left("ViT-L-14")
    assert (choice.config["quick_gelu"], choice.mistaken) == (False, False)
    assert not {"mean", "std"} & choice.preprocess.keys()
    (message,) = warned(caplog)
    for part in ("URL", "activation function", "QuickGELU (openai", "and GELU is taken",
                 "mean is", "(0.5, 0.5, 0.5) (laion2b_s32b_b82k)",
                 "ViT-L-14/TAG@URL"):  # fmt: skip
        assert part in message
    assert "\n" not in message


def test_a_tag_s_preprocessing_comes_with_openai_s_tensors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    choice = left("ViT-L-14", names=["input_resolution"])
    assert choice.config["quick_gelu"]
    assert choice.preprocess["mean"] == open_clip.get_pretrained_cfg("ViT-L-14", "openai")["mean"]
    assert not warned(caplog)


def test_a_tag_that_contradicts_the_file_is_said(caplog: pytest.LogCaptureFixture) -> None:
    choice = left("ViT-L-14", "laion2b_s32b_b82k", ["vocab_size"])
    assert (choice.config["quick_gelu"], choice.mistaken) == (False, False)
    (message,) = warned(caplog)
    assert "ViT-L-14/laion2b_s32b_b82k asks for GELU" in message


@pytest.mark.parametrize(
    "tag", [t for t in open_clip.list_pretrained_tags_by_model("ViT-B-32") if t]
)
def test_with_a_tag_the_tag_decides(tag: str) -> None:
    config = open_clip.get_pretrained_cfg("ViT-B-32", tag)
    choice = left("ViT-B-32", tag)
    assert choice.config["quick_gelu"] == bool(config.get("quick_gelu"))
    assert choice.preprocess == config


# --- timm ----------------------------------------------------------------------------------


def test_timm_s_notes_decide_about_every_tag() -> None:
    natively = [
        name
        for name in timm.list_pretrained("vit_*_clip_*")
        if "natively QuickGELU" in " ".join(timm.get_pretrained_cfg(name).notes or ())
    ]
    assert len(natively) > 20
    for name in timm.list_pretrained("vit_*_clip_*"):
        network = timm_models._native(name, None)
        assert ("quickgelu" in network) == (name in natively)
        assert timm.is_model(network.partition(".")[0])
        assert network.partition(".")[2] == name.partition(".")[2]


def test_timm_s_tags_that_disagree_are_said(caplog: pytest.LogCaptureFixture) -> None:
    weights = checkpoints.Weights("URL", {}, {}, "")
    assert timm_models._native("vit_base_patch16_clip_224", weights) == "vit_base_patch16_clip_224"
    (message,) = warned(caplog)
    for part in ("QuickGELU (", "openai", "GELU is taken", "vit_base_patch16_clip_224.TAG@URL"):
        assert part in message
    caplog.clear()
    timm_models._native("vit_base_patch16_224", weights)
    (message,) = warned(caplog)
    assert "mean is" in message
    caplog.clear()
    timm_models._native("vit_base_patch16_224.mae", weights)
    timm_models._native("vit_small_patch14_dinov2", weights)  # one tag
    assert not warned(caplog)


# --- Other image sizes ----------------------------------------------------------------------


def words(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if "interpolated" in r.getMessage()
            and r.levelno == level]  # fmt: skip


@pytest.mark.parametrize("family", ["clip", "timm"])
def test_files_of_another_image_size_are_said(
    family: str, small: Reference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = str(tmp_path / "x.pt")
    if family == "clip":
        state = {k.removeprefix("visual."): t.float() for k, t in small.state.items()}
        state["positional_embedding"] = torch.randn(1 + 9 * 9, 384)
        arch, size = "ViT-S-32", 224
    else:
        state = vit.load("timm", "test_vit/random", image_size=320).module.state_dict()
        arch, size = "test_vit", 160
    torch.save(state, place)
    caplog.set_level(logging.INFO)
    assert vit.load(family, f"{arch}@{place}").image_size == (size, size)
    (message,) = words(caplog, logging.WARNING)
    assert place in message
    assert "Say --image-size" in message
    caplog.clear()
    vit.load(family, f"{arch}@{place}")  # as the next stage or work item does
    assert not words(caplog, logging.WARNING)
    vit.load(family, f"{arch}@{place}", image_size=96)  # asked for: told, not warned
    assert len(words(caplog, logging.INFO)) == 1
    assert not words(caplog, logging.WARNING)
    caplog.clear()
    vit.load(family, f"{arch}@{place}", image_size=9 * 32 if family == "clip" else 320)
    assert not words(caplog, logging.INFO)


def test_positions_that_are_no_square(small: Reference, tmp_path: Path) -> None:
    state = small.state | {"visual.positional_embedding": torch.randn(1 + 7 * 8, 384)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(vit.registry.ModelError, match=r"does not fit .* \[57, 384\].* \[50, 384\]"):
        vit.load("clip", f"ViT-S-32@{tmp_path / 'x.pt'}")
