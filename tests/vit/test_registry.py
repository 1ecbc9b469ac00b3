"""Families by name, layers, and sizes that the user states."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saev import vit
from saev.errors import ModelError
from saev.vit import Tower, dino


def test_builtin_families():
    assert {"clip", "siglip", "timm", "dinov2", "dinov3"} <= set(vit.families())


@pytest.mark.parametrize(
    ("name", "near"), [("dinov4", "dinov"), ("CLIP", "clip"), ("sigclip", "siglip")]
)
def test_unknown_family_lists_the_known_and_the_nearest(name: str, near: str):
    message = rf"Unknown model family '{name}'\. Did you mean {near}.*\? There are clip, "
    with pytest.raises(ModelError, match=message):
        vit.load(name, "x")


def test_a_family_name_is_taken_once():
    def first(ckpt: str, image_size: tuple[int, int] | None) -> Tower:
        raise ModelError("first")

    def second(ckpt: str, image_size: tuple[int, int] | None) -> Tower:
        raise ModelError("second")

    vit.register_family("test-taken")(first)
    vit.register_family("test-taken")(first)  # a notebook cell run twice
    with pytest.raises(ModelError, match="already registered"):
        vit.register_family("test-taken")(second)
    with pytest.raises(ModelError, match="already registered"):
        vit.register_family("clip")(second)
    with pytest.raises(ModelError, match="first"):
        vit.load("test-taken", "x")


def test_installed_packages_declare_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "my_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saev.families]\nmine = my_models_test:load_mine\n")
    (tmp_path / "my_models_test.py").write_text(
        "from saev.vit.timm_models import load_timm\n"
        "def load_mine(ckpt, image_size=None):\n"
        "    return load_timm('test_vit/' + ckpt, image_size)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "mine" in vit.families()
    model = vit.load("mine", "random", image_size=32)
    assert (model.family, model.ckpt, model.name) == ("mine", "random", "mine random")
    assert model.d_model == 64


@given(st.integers(1, 40), st.data())
def test_resolve_layers(n: int, data: st.DataObject):
    picked = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    given_as = [i - n if data.draw(st.booleans()) else i for i in picked]
    assert vit.resolve_layers(given_as, n) == tuple(picked)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "No layer is given"),
        ((12,), "Layer 12 does not exist: the model has 12 blocks, so layers are 0 to 11, or -12"),
        ((3, -13), "Layer -13 does not exist"),
        ((11, 4, -1), r"Layers 11 and -1 are the same block \(11 of 12\)"),
        ((4, 4), "Layers 4 and 4 are the same block"),
    ],
)
def test_layers_that_do_not_exist(layers: tuple[int, ...], message: str):
    with pytest.raises(ModelError, match=message):
        vit.resolve_layers(layers, 12)


def test_sizes_that_the_user_states_are_checked():
    model = vit.load("timm", "test_vit/random", image_size=(32, 48))
    assert (model.d_model, model.content_tokens_per_example, model.n_layers) == (64, 6, 6)
    assert (model.grid, model.image_size, model.ckpt_checksum) == ((2, 3), (32, 48), None)
    vit.check_expectations(model)
    vit.check_expectations(model, d_model=64, content_tokens_per_example=6)
    with pytest.raises(ModelError, match=r"--d-model is 768, but timm test_vit/random has .* 64"):
        vit.check_expectations(model, d_model=768)
    with pytest.raises(ModelError, match=r"is 196, but .* has 6 content tokens .* 32 x 48"):
        vit.check_expectations(model, content_tokens_per_example=196)


@pytest.mark.parametrize(
    ("size", "message"),
    [(100, "patches are 16 x 16 pixels; use a multiple, such as 96 or 112"), (0, "at least 1")],
)
def test_image_sizes_that_do_not_fit(size: int, message: str):
    with pytest.raises(ModelError, match=message):
        vit.load("timm", "test_vit/random", image_size=size)


@pytest.mark.parametrize("size", [33, (32, 40)])
def test_image_sizes_that_do_not_fit_open_clip(size: int | tuple[int, int]):
    with pytest.raises(ModelError, match="patches are 32 x 32 pixels"):
        vit.load("clip", "ViT-S-32/random", image_size=size)


def test_random_weights_are_fixed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = vit.load("timm", "test_vit/random", image_size=32)
    assert torch.equal(torch.randn(3), expected)
    second = vit.load("timm", "test_vit/random", image_size=32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(first.record(images, [-1]), second.record(images, [-1]))
    clip = [vit.load("clip", "ViT-S-32/random", image_size=32) for _ in range(2)]
    assert torch.equal(clip[0].pool(images), clip[1].pool(images))


@pytest.mark.parametrize(
    ("family", "arch", "expected"),
    [
        ("dinov2", "small", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2", "base-reg", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("dinov2", "dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2.lvd142m"),
        ("dinov2", "dinov2_vitg14_reg4_pretrain", "vit_giant_patch14_reg4_dinov2.lvd142m"),
        ("dinov2", "facebook/dinov2-base", "vit_base_patch14_dinov2.lvd142m"),
        ("dinov2", "dinov2-with-registers-small", "vit_small_patch14_reg4_dinov2.lvd142m"),
        ("dinov2", "vit_small_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("dinov3", "dinov3_vitb16_pretrain_lvd1689m", "vit_base_patch16_dinov3.lvd1689m"),
        ("dinov3", "dinov3-vitl16-pretrain-sat493m", "vit_large_patch16_dinov3.sat493m"),
        ("dinov3", "dinov3-vits16plus-pretrain-lvd1689m", "vit_small_plus_patch16_dinov3.lvd1689m"),
        ("dinov3", "vit7b16", "vit_7b_patch16_dinov3.lvd1689m"),
    ],
)
def test_dino_names(family: str, arch: str, expected: str):
    names = {"dinov2": dino.DINOV2, "dinov3": dino.DINOV3}[family]
    assert dino.timm_name(family, names, arch) == expected


@pytest.mark.parametrize(
    ("family", "ckpt"),
    [
        ("dinov2", "vits16"),
        ("dinov2", "huge/random"),
        ("dinov2", "vit_base_patch16_224/random"),
        ("dinov3", "vitb16_sat"),
        ("dinov3", "vitb16_reg"),
        ("dinov2", "small/tag"),
    ],
)
def test_dino_names_that_do_not_exist(family: str, ckpt: str):
    with pytest.raises(ModelError, match=f"{family} has no checkpoint"):
        vit.load(family, ckpt)


def test_every_dino_name_is_timms():
    import timm

    for name in [*dino.DINOV2.values(), *dino.DINOV3.values()]:
        assert name in timm.list_pretrained(name.split(".")[0] + ".*")
