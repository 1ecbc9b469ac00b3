"""Checkpoint names, weights files of every kind, and what is refused."""

import json
import typing as tp
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from saev import storage, vit
from saev.errors import CorruptDataError, ModelError, StorageError
from saev.vit import checkpoints
from saev.vit.checkpoints import CkptName


@pytest.mark.parametrize(
    ("ckpt", "expected"),
    [
        ("vit_base_patch16_224.mae", CkptName("vit_base_patch16_224.mae")),
        ("ViT-B-16/openai", CkptName("ViT-B-16", tag="openai")),
        ("ViT-B-16/random", CkptName("ViT-B-16", random=True)),
        ("vits14@s3://b/x.pt", CkptName("vits14", url="s3://b/x.pt")),
        ("vits14@/mnt/x@2.pt", CkptName("vits14", url="/mnt/x@2.pt")),
        ("vits14@rel/x", CkptName("vits14", url="rel/x")),
        ("ViT-B-16/openai@gs://b/x", CkptName("ViT-B-16", tag="openai", url="gs://b/x")),
        ("ViT-B-16/s3://b/x", CkptName("ViT-B-16", url="s3://b/x")),
        ("ViT-B-16//mnt/x", CkptName("ViT-B-16", url="/mnt/x")),
        ("ViT-B-16/x/y.safetensors", CkptName("ViT-B-16", url="x/y.safetensors")),
        ("s3://user@b/x", CkptName(None, url="s3://user@b/x")),
        ("/mnt/x", CkptName(None, url="/mnt/x")),
        ("./x.pt", CkptName(None, url="./x.pt")),
    ],
)
def test_names(ckpt: str, expected: CkptName):
    assert checkpoints.parse(ckpt) == expected


@pytest.mark.parametrize("ckpt", ["", "ViT-B-16/", "@s3://b/x", "vits14@", "x/random@s3://b/x"])
def test_incomplete_names(ckpt: str):
    with pytest.raises(ModelError, match=r"incomplete|drop one"):
        checkpoints.parse(ckpt)


# --- Weights files --------------------------------------------------------------------------------


def noise(net: torch.nn.Module, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in net.state_dict().items()}


@pytest.fixture(scope="module")
def trained() -> tuple[tp.Any, dict[str, Tensor]]:
    """A timm network with weights that no seed gives, and its state dict."""
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(noise(net))
    return net, {k: v.clone() for k, v in net.state_dict().items()}


def with_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


LAYOUTS: dict[str, tp.Callable[[dict[str, Tensor]], tp.Any]] = {
    "plain": lambda s: s,
    "with a head": with_head,
    "module.": lambda s: prefixed(with_head(s), "module."),
    "backbone.": lambda s: prefixed(s, "backbone.") | {"head.weight": torch.zeros(2, 2)},
    "visual.trunk. beside text": lambda s: prefixed(s, "visual.trunk.") | {"text.x": torch.ones(1)},
    "in state_dict": lambda s: {"epoch": 3, "state_dict": prefixed(s, "module."), "lr": 0.1},
    "in model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "EMA first": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "teacher beside student": lambda s: {
        "student": {k: v + 1 for k, v in s.items()},
        "teacher": prefixed(s, "backbone."),
    },
    "OrderedDict": OrderedDict,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_torch_files(layout: str, trained: tp.Any, tmp_path: Path):
    net, state = trained
    url = str(tmp_path / "weights.bin")
    torch.save(LAYOUTS[layout](state), url)
    model = vit.load("timm", f"test_vit@{url}")
    images = torch.randn(2, 3, *model.image_size)
    with torch.no_grad():
        assert torch.equal(model.pool(images), net.forward_head(net.forward_features(images)))
    assert model.ckpt_checksum == storage.checksum(url)


def test_safetensors_on_object_storage(trained: tp.Any):
    net, state = trained
    url = "memory://models/x.safetensors"
    half = {k: v.half() for k, v in prefixed(with_head(state), "module.").items()}
    storage.write_bytes(url, safetensors.torch.save(half, metadata={"architecture": "test_vit"}))
    images = torch.randn(2, 3, 160, 160)
    by_name = vit.load("timm", f"test_vit@{url}")
    alone = vit.load("timm", url)  # the file says what it is
    with torch.no_grad():
        expected = net.forward_features(images)[:, 0]
    assert torch.equal(by_name.pool(images), alone.pool(images))
    torch.testing.assert_close(by_name.pool(images), expected, rtol=0, atol=0.1)
    assert by_name.module.state_dict()["cls_token"].dtype == torch.float32
    assert alone.ckpt_checksum == storage.checksum(url)


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("test_vit", 64),
        ("test_vit", (64, 96)),
        ("test_vit2", 64),
        ("vit_pe_core_tiny_patch16_384", 64),
        ("flexivit_small", 64),
    ],
)
def test_other_sizes_are_interpolated_as_timm_does(
    arch: str, size: int | tuple[int, int], tmp_path: Path
):
    state = noise(timm.create_model(arch, num_classes=0))
    url = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file(state, url)
    model = vit.load("timm", f"{arch}@{url}", image_size=size)
    expected = timm.create_model(
        arch,
        pretrained=True,
        num_classes=0,
        img_size=size,
        pretrained_cfg_overlay={"state_dict": state, "custom_load": False},
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name


def test_metas_own_dinov2_file(tmp_path: Path):
    """Meta's file has a mask token, and names what it is; its grid is resized from 37 x 37."""
    net = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = noise(net)
    state["pos_embed"] = torch.randn(1, 1370, 384)
    url = tmp_path / "dinov2_vits14_pretrain-0123abcd.pth"
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, url)
    model = vit.load("dinov2", str(url), image_size=56)
    assert model.grid == (4, 4)
    assert torch.equal(model.module.state_dict()["blocks.3.attn.qkv.weight"],
                       state["blocks.3.attn.qkv.weight"])  # fmt: skip
    place: tp.Any = model.module.state_dict()["pos_embed"]
    assert place.shape == (1, 17, 384)
    assert torch.equal(place[:, 0], state["pos_embed"][:, 0])


def meta_dinov3(bias: float) -> dict[str, Tensor]:
    """Tensors as in Meta's DINOv3 files, from timm's."""
    out = {}
    for name, value in noise(timm.create_model("vit_small_patch16_dinov3", num_classes=0)).items():
        name = name.replace("reg_token", "storage_tokens")
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        out[name] = value
        if name.endswith("qkv.weight"):
            out[name.replace("weight", "bias")] = torch.full((3 * 384,), bias)
            out[name.replace("weight", "bias_mask")] = torch.ones(3 * 384)
    return out | {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}


def test_metas_own_dinov3_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(meta_dinov3(0.0), url)
    model = vit.load("dinov3", str(url), image_size=32)
    assert torch.equal(model.module.state_dict()["reg_token"], meta_dinov3(0.0)["storage_tokens"])
    torch.save(meta_dinov3(0.5), url)
    with pytest.raises(ModelError, match=r"has attention biases .* use vit_small_\w+_qkvb\.lvd"):
        vit.load("dinov3", str(url), image_size=32)
    vit.load("dinov3", f"vit_small_patch16_dinov3_qkvb@{url}", image_size=32)
    assert capsys.readouterr().out == ""  # stdout is for the result's URL


# --- open_clip ------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}
TINY_SIGLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit4", "timm_pool": "map",
                   "timm_proj": "none"},
    "text_cfg": {**TINY["text_cfg"], "width": 64},
    "custom_text": True,
}  # fmt: skip
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "resize_mode": "squash"}


def write_open_clip(folder: Path, config: dict[str, tp.Any]) -> tp.Any:
    """A whole open_clip model (image and text tower) in a folder, as push_to_hf_hub writes it."""
    custom = config.get("custom_text", False)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    args = {k: v for k, v in config.items() if k != "custom_text"}
    torch.manual_seed(11)
    model = kind(**json.loads(json.dumps(args))).eval()
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    )
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return model


@pytest.mark.parametrize("config", [TINY, TINY_SIGLIP], ids=["clip", "siglip"])
def test_open_clip_local_folder(config: dict[str, tp.Any], tmp_path: Path):
    reference = write_open_clip(tmp_path / "m", config)
    family = "siglip" if config is TINY_SIGLIP else "clip"
    model = vit.load(family, f"local-dir:{tmp_path / 'm'}")
    images = torch.randn(2, 3, *model.image_size)
    with torch.no_grad():
        torch.testing.assert_close(model.pool(images), reference.encode_image(images))
    assert model.spec.mean == (0.5, 0.4, 0.3)
    assert model.spec.resize == model.image_size
    weights = tmp_path / "m" / "open_clip_model.safetensors"
    assert model.ckpt_checksum == storage.checksum(weights)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client with its network switched off and an empty cache of its own."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(cache))
    return cache


def cached(cache: Path, repo: str) -> Path:
    """A snapshot folder of the hub's cache, to be filled."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123456789abcdef")
    return root / "snapshots" / "0123456789abcdef"


@pytest.mark.parametrize("size", [None, 32, (32, 64)])
@pytest.mark.parametrize("config", [TINY, TINY_SIGLIP], ids=["clip", "siglip"])
def test_hub_and_folder_agree(config: dict[str, tp.Any], size: int | None, offline_hub: Path):
    """Two independent ways to the same network: open_clip's own, and ours, at every size."""
    folder = cached(offline_hub, "org/tiny")
    write_open_clip(folder, config)
    by_hub = vit.load("clip", "hf-hub:org/tiny", image_size=size)
    by_folder = vit.load("clip", f"local-dir:{folder}", image_size=size)
    assert by_hub.spec == by_folder.spec
    assert by_hub.grid == by_folder.grid
    assert by_hub.ckpt_checksum is None
    images = torch.randn(2, 3, *by_hub.image_size)
    assert torch.equal(by_hub.record(images, [0, 1]), by_folder.record(images, [0, 1]))


def test_timm_hub_cache(trained: tp.Any, offline_hub: Path):
    _, state = trained
    folder = cached(offline_hub, "timm/test_vit.r160_in1k")
    folder.mkdir(parents=True)
    safetensors.torch.save_file(with_head(state), folder / "model.safetensors")
    plain = vit.load("timm", "test_vit.r160_in1k")
    as_on_the_hub = vit.load("timm", "timm/test_vit.r160_in1k")
    images = torch.randn(2, 3, *plain.image_size)
    assert torch.equal(plain.module.state_dict()["cls_token"], state["cls_token"])
    assert torch.equal(plain.pool(images), as_on_the_hub.pool(images))


@pytest.mark.parametrize(
    ("family", "ckpt", "remedy"),
    [
        ("timm", "test_vit.r160_in1k", "test_vit.r160_in1k@FILE"),
        ("timm", "hf-hub:org/absent", "ARCH@FILE"),
        ("clip", "ViT-S-32/random_tag", "has no pretrained tag 'random_tag' of ViT-S-32"),
        ("clip", "ViT-B-32/laion2b_s34b_b79k", "ViT-B-32/laion2b_s34b_b79k@FILE"),
        ("clip", "hf-hub:org/absent", "ARCH@FILE"),
        ("dinov2", "vits14", "vit_small_patch14_dinov2.lvd142m@FILE"),
    ],
)
def test_without_network_one_error_names_the_remedy(
    family: str, ckpt: str, remedy: str, offline_hub: Path
):
    with pytest.raises(ModelError) as err:
        vit.load(family, ckpt)
    assert remedy in str(err.value)
    assert "\n" not in str(err.value)


def test_openai_weights_bring_their_activation_function(tmp_path: Path):
    """open_clip only warns if weights trained with QuickGELU meet a GELU network."""
    net: tp.Any = vit.load("clip", "ViT-B-32/random", image_size=32).module
    url = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file(
        {f"visual.{k}": v.contiguous() for k, v in net.state_dict().items()}, url
    )
    openai: tp.Any = vit.load("clip", f"ViT-B-32/openai@{url}", image_size=32).module
    assert type(net.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assert type(openai.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


# --- Refusals -------------------------------------------------------------------------------------


def refuse(ckpt: str, message: str, error: type[Exception] = ModelError) -> None:
    with pytest.raises(error, match=message) as err:
        vit.load("timm", ckpt, image_size=32)
    assert "\n" not in str(err.value)


def test_missing_and_mismatching_parameters(trained: tp.Any, tmp_path: Path):
    _, state = trained
    url = str(tmp_path / "x.safetensors")
    short = {k: v for k, v in state.items() if not k.startswith("blocks.5.")}
    short["norm.weight"] = torch.zeros(3)
    safetensors.torch.save_file(short, url)
    refuse(
        f"test_vit@{url}",
        r"does not fit test_vit: of its \d+ tensors 12 missing \(first: blocks.5.norm1.weight, .*"
        r"1 of another shape \(first: norm.weight \[3\], expected \[64\]\)",
    )
    refuse(f"vit_tiny_patch16_224@{url}", "does not fit vit_tiny_patch16_224")
    safetensors.torch.save_file({"x": torch.zeros(1)}, url)
    refuse(f"test_vit@{url}", r"The file holds 1 \(first: x\)")
    with pytest.raises(ModelError, match="does not fit ViT-S-32"):
        vit.load("clip", f"ViT-S-32@{url}")


class NotATensor:
    """What an argparse namespace in a training checkpoint is: a class to be unpickled."""


def test_files_that_are_not_weights(trained: tp.Any, tmp_path: Path):
    _, state = trained
    url = tmp_path / "x"
    torch.save({"model": state, "args": NotATensor()}, url)
    refuse(f"test_vit@{url}", r"\(test_vit_checkpoints.NotATensor\), which are never unpickled")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), url)
    refuse(f"test_vit@{url}", "TorchScript archive")
    torch.save([1, 2], url)
    refuse(f"test_vit@{url}", "holds no named tensors")
    url.write_bytes(b"not a checkpoint")
    refuse(f"test_vit@{url}", "neither safetensors nor a torch state dict", CorruptDataError)
    url.write_bytes(b"")
    refuse(f"test_vit@{url}", "neither safetensors nor a torch state dict", CorruptDataError)
    whole = safetensors.torch.save(state)
    for n in (9, 100, len(whole) - 1):
        url.write_bytes(whole[:n])
        refuse(f"test_vit@{url}", "not readable as safetensors", CorruptDataError)
    torch.save(state, url)
    url.write_bytes(url.read_bytes()[:-100])
    refuse(f"test_vit@{url}", "neither safetensors nor", CorruptDataError)
    refuse(f"test_vit@{tmp_path}/absent", "does not exist", StorageError)


def test_a_file_with_two_networks(trained: tp.Any, tmp_path: Path):
    _, state = trained
    url = tmp_path / "x"
    torch.save(prefixed(state, "student.") | prefixed(state, "teacher."), url)
    refuse(f"test_vit@{url}", r"two networks that fit, '(student|teacher)\.\*' and")
    torch.save(state | prefixed(state, "ema."), url)  # one of them has the plain names
    vit.load("timm", f"test_vit@{url}")


@pytest.mark.parametrize(
    ("family", "ckpt", "message"),
    [
        ("timm", "vit_tini_patch16_224/random", "Did you mean vit_tiny_patch16_224"),
        ("timm", "vit_tiny_patch16_224.nope/random", "no pretrained tag 'nope' .* augreg_in21k"),
        ("timm", "vit_tiny_patch16_224/augreg", "after a dot, as in vit_tiny_patch16_224.augreg"),
        ("clip", "ViT-B-17/random", "open_clip has no model 'ViT-B-17'. Did you mean ViT-B-16"),
        ("clip", "ViT-B-16", "names no weights; write ViT-B-16/TAG with one of openai"),
        ("clip", "s3://b/x.pt", "does not say which architecture"),
        ("siglip", "ViT-B-16/openai", "not a SigLIP model. Did you mean ViT-B-16-SigLIP"),
    ],
)
def test_names_that_do_not_exist(family: str, ckpt: str, message: str):
    with pytest.raises(ModelError, match=message):
        vit.load(family, ckpt)


def test_a_file_that_does_not_say_what_it_is(trained: tp.Any, tmp_path: Path):
    url = tmp_path / "x.safetensors"
    safetensors.torch.save_file(trained[1], url)
    refuse(str(url), "does not say which architecture it holds; write ARCH@")
