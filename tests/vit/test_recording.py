"""Recorded activations against an independent forward pass of the same network, bit by bit."""

import concurrent.futures
import gc
import typing as tp
import weakref

import open_clip.transformer
import pytest
import timm
import torch
from torch import Tensor, nn

from saev import vit
from saev.errors import ModelError
from saev.images import ImageSpec
from saev.vit import Tower, VisionModel


def shaken(model: VisionModel) -> VisionModel:
    """The model with noise on every parameter: layer scales of 1e-5 and register tokens of 1e-6
    would otherwise hide what the blocks do."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def pictures(model: VisionModel, n: int = 3) -> Tensor:
    return torch.randn(n, 3, *model.image_size, generator=torch.Generator().manual_seed(2))


def with_class(content: Tensor, prefix: Tensor | None) -> Tensor:
    return content if prefix is None else torch.cat([prefix[:, :1], content], dim=1)


# name, image size, special tokens in the network, class token
TIMM = [
    ("vit_tiny_patch16_224", 32, 1, True),
    ("deit_tiny_distilled_patch16_224", 32, 2, True),
    ("vit_small_patch14_dinov2", 28, 1, True),
    ("vit_small_patch14_reg4_dinov2", 28, 5, True),
    ("vit_small_patch16_dinov3", (32, 48), 5, True),
    ("vit_medium_patch16_gap_256", 32, 0, False),
    ("test_vit2", 32, 1, False),  # a register token but no class token
    ("vit_pe_core_tiny_patch16_384", 32, 1, True),
    ("eva02_tiny_patch14_224", 28, 1, True),
    ("test_vit", (32, 64), 1, True),
]


@pytest.mark.parametrize(("name", "size", "special", "cls"), TIMM, ids=[t[0] for t in TIMM])
def test_timm_matches_forward_intermediates(
    name: str, size: int | tuple[int, int], special: int, cls: bool
):
    model = shaken(vit.load("timm", f"{name}/random", image_size=size))
    net: tp.Any = model.module
    images = pictures(model)
    last = model.n_layers - 1
    layers = [last, 0, 3]
    found = model.record(images, layers)

    assert net.num_prefix_tokens == special
    assert model.has_cls_token is cls
    with torch.no_grad():
        expected = net.forward_intermediates(
            images,
            indices=sorted(layers),
            return_prefix_tokens=bool(special),
            norm=False,
            output_fmt="NCHW",
            intermediates_only=True,
        )
    by_layer = dict(zip(sorted(layers), expected, strict=True))
    for row, layer in enumerate(layers):
        content, prefix = by_layer[layer] if special else (by_layer[layer], None)
        assert content.shape[2:] == model.grid
        content = content.flatten(2).transpose(1, 2)  # row-major
        assert torch.equal(found[row], with_class(content, prefix if cls else None))
        assert torch.equal(model.record(images, [layer], cls_token=False)[0], content)
    assert found.shape == (3, 3, cls + content.shape[1], model.d_model)
    # Each layer and each token is told apart, or the comparison above would prove little.
    flat = found.flatten(0, 2)
    assert len(torch.unique(flat, dim=0)) == len(flat)


def by_hand(visual: tp.Any, images: Tensor) -> list[Tensor]:
    """open_clip's own ViT, written out: the residual stream after every block, [batch, L, D]."""
    x = visual.conv1(images).flatten(2).permute(0, 2, 1)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([cls, x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    streams = []
    for block in visual.transformer.resblocks:
        heads = block.attn.num_heads
        y = block.ln_1(x)
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2)
            for t in nn.functional.linear(
                y, block.attn.in_proj_weight, block.attn.in_proj_bias
            ).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
        streams.append(x)
    return streams


@pytest.mark.parametrize("size", [64, (64, 96)])
def test_clip_matches_a_forward_pass_written_by_hand(size: int | tuple[int, int]):
    model = shaken(vit.load("clip", "ViT-S-32/random", image_size=size))
    # In float64, since how far float32 goes apart depends on the processor.
    model.module.double()
    images = pictures(model).double()
    with torch.no_grad():
        expected = by_hand(model.module, images)
    found = model.record(images, range(model.n_layers))
    assert model.has_cls_token
    assert found.shape[2] == 1 + model.content_tokens_per_example
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_clip_with_length_first_blocks():
    """Old open_clip runs its blocks as [tokens, batch, width]; the recording is the same."""
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=16, width=64, layers=3, heads=2, mlp_ratio=2.0, output_dim=8,
        patch_dropout=0.5,
    )  # fmt: skip
    weights = visual.transformer.state_dict()
    visual.transformer = open_clip.transformer.Transformer(64, 3, 2, 2.0, batch_first=False)
    visual.transformer.load_state_dict(weights)
    spec = ImageSpec(image_size=(32, 32), resize=32)
    tower = Tower(module=visual, blocks=visual.transformer.resblocks, grid=(2, 2), spec=spec)
    model = VisionModel(tower, family="test", ckpt="length-first")
    images = pictures(model, n=5)  # as many as there are tokens: the axes are not guessed
    with torch.no_grad():
        expected = torch.stack(by_hand(visual, images))
    torch.testing.assert_close(model.record(images, [0, 1, 2]), expected, rtol=1e-4, atol=1e-5)


def test_siglip_has_no_class_token():
    model = shaken(vit.load("siglip", "ViT-B-16-SigLIP2/random", image_size=32))
    images = pictures(model)
    net: tp.Any = model.module
    found = model.record(images, [0, 11])
    with torch.no_grad():
        expected = net.forward_intermediates(
            images, indices=[0, 11], normalize_intermediates=False, output_fmt="NLC"
        )
    assert not model.has_cls_token
    assert found.shape == (2, 3, 4, 768)
    assert torch.equal(found, torch.stack(expected["image_intermediates"]))
    assert torch.equal(model.pool(images), expected["image_features"])


def test_pool_is_what_the_classifier_reads():
    model = shaken(vit.load("dinov2", "vits14_reg/random", image_size=28))
    images = pictures(model)
    net: tp.Any = model.module
    with torch.no_grad():
        expected = net.forward_intermediates(images)[0][:, 0]  # the class token, after the norm
        mean = net.norm(model.record(images, [-1])[0])[:, 1:].mean(dim=1)
    assert torch.equal(model.pool(images), expected)
    assert not torch.allclose(model.pool(images), mean)


def test_recording_stops_early_and_leaves_the_model_as_it_was():
    model = shaken(vit.load("timm", "vit_tiny_patch16_224/random", image_size=32))
    net: tp.Any = model.module
    images = pictures(model)
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, _a, i=i: ran.append(i))
        for i, block in enumerate(net.blocks)
    ]
    model.record(images, [2, 4])
    assert ran == [0, 1, 2, 3, 4]
    for handle in handles:
        handle.remove()
    reference: tp.Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    reference.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net(images), reference(images))
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_a_failing_forward_pass_leaves_the_model_usable():
    model = vit.load("timm", "vit_tiny_patch16_224/random", image_size=32)
    net: tp.Any = model.module
    handle = net.blocks[3].register_forward_pre_hook(lambda _m, _a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.record(pictures(model), [5])
    handle.remove()
    with torch.no_grad():
        assert net(pictures(model)).shape == (3, 192)  # runs past block 5
    assert model.record(pictures(model), [5]).shape == (1, 3, 5, 192)


def test_threads_do_not_mix_their_recordings():
    model = vit.load("timm", "test_vit/random", image_size=32)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(12)]
    serial = [model.record(b, [i % 6]) for i, b in enumerate(batches)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda ib: model.record(ib[1], [ib[0] % 6]), enumerate(batches)))
    assert all(torch.equal(a, b) for a, b in zip(serial, parallel, strict=True))


def test_recordings_are_ordinary_tensors():
    model = vit.load("timm", "test_vit/random", image_size=32)
    found = model.record(pictures(model), [-1])
    found.mul_(2)  # an inference-mode tensor would refuse
    assert not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model.record(pictures(model), [-1])
    assert lower.shape == found.shape


def test_images_of_another_size_are_refused():
    model = vit.load("timm", "test_vit/random", image_size=32)
    with pytest.raises(ModelError, match=r"\[batch, 3, 32, 32\], found \[2, 3, 48, 32\]"):
        model.record(torch.zeros(2, 3, 48, 32), [0])
    with pytest.raises(ModelError, match=r"Layer 6 does not exist: the model has 6 blocks"):
        model.record(torch.zeros(2, 3, 32, 32), [6])


NOT_PLAIN = [
    ("timm", "resnet18/random", "it has no blocks"),
    ("timm", "swin_tiny_patch4_window7_224/random", "it has no blocks"),
    ("timm", "hiera_tiny_224/random", "not a plain ViT"),
    ("timm", "xcit_nano_12_p16_224/random", "no grid"),
    ("clip", "RN50/random", "not a plain ViT"),
]


@pytest.mark.parametrize(("family", "ckpt", "message"), NOT_PLAIN, ids=[t[1] for t in NOT_PLAIN])
def test_networks_that_are_not_plain_vits_are_refused(family: str, ckpt: str, message: str):
    with pytest.raises(ModelError, match=message):
        vit.load(family, ckpt)


class Block(nn.Module):
    def __init__(self, output: str):
        super().__init__()
        self.linear, self.output = nn.Linear(8, 8), output

    def forward(self, x: Tensor) -> tp.Any:
        x = x + self.linear(x)
        return {"tuple": (x, None), "dict": {"x": x}, "half": x[:, ::2]}.get(self.output, x)


class Toy(nn.Module):
    def __init__(self, output: str = "", order: tuple[int, ...] = (0, 1, 2)):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(Block(output) for _ in range(3))
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for i in self.order:
            y = self.blocks[i](x)
            x = y[0] if isinstance(y, tuple) else y["x"] if isinstance(y, dict) else y
        return x


def toy(net: Toy, **changes: tp.Any) -> VisionModel:
    spec = ImageSpec(image_size=(8, 12), resize=(8, 12))
    fields = {"special_tokens": 0, "cls_token": False, "grid": (2, 3)} | changes
    tower = Tower(module=net, blocks=net.blocks, spec=spec, **fields)
    return VisionModel(tower, family="toy", ckpt="x")


def test_blocks_may_return_tuples():
    torch.manual_seed(0)
    plain, tupled = Toy(), Toy("tuple")
    tupled.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 12)
    found = toy(tupled).record(images, [0, 2])
    assert torch.equal(found, toy(plain).record(images, [0, 2]))
    assert torch.equal(toy(plain).pool(images), found[1].mean(dim=1))


@pytest.mark.parametrize(
    ("family", "ckpt"), [("timm", "test_vit/random"), ("clip", "ViT-S-32/random")]
)
def test_its_memory_is_free_as_soon_as_nobody_uses_it(family: str, ckpt: str):
    gc.collect()
    gc.disable()
    try:
        model = vit.load(family, ckpt)
        module = weakref.ref(model.module)
        del model
        assert module() is None
    finally:
        gc.enable()


def test_a_network_that_outlives_its_model_runs():
    net = Toy()
    images = torch.randn(1, 3, 8, 12)
    model = toy(net)
    expected = model.module(images)
    del model
    assert torch.equal(net(images), expected)


def test_a_refused_network_keeps_no_hooks():
    net = Toy()
    with pytest.raises(ModelError):
        toy(net, grid=(2, 2))
    assert not any(block._forward_hooks for block in net.blocks)


@pytest.mark.parametrize(
    ("net", "changes", "message"),
    [
        (Toy("dict"), {}, "Block 0 of toy x returns dict"),
        (Toy("half"), {}, "not a plain ViT"),
        (Toy(order=(0, 2, 1)), {}, r"ran in the order \[0, 2\]"),
        (Toy(order=(0, 1, 1, 2)), {}, r"\[0, 1, 1, 2\]"),
        (Toy(order=(0, 1)), {}, r"ran in the order \[0, 1\]"),
        (Toy(), {"special_tokens": 1}, r"\[\[2, 6, 8\]\], expected \[2, 7, d_model\]"),
        (Toy(), {"grid": (2, 2)}, r"expected \[2, 4, d_model\]"),
        (Toy(), {"cls_token": True}, "states a class token but no special tokens"),
    ],
)
def test_a_tower_that_states_other_tokens_than_it_has_is_refused(
    net: Toy, changes: dict[str, tp.Any], message: str
):
    with pytest.raises(ModelError, match=message):
        toy(net, **changes)
