"""What a recording is called: by its images, its weights and its network, never by places."""

import logging
import shutil
import typing as tp
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from saev import storage, vit
from saev.config import ImgFolder
from saev.config.run import RunFile
from saev.config.source import ActivationSource, compare
from saev.config.stages import resolve_stages
from saev.errors import IncompleteError, ModelError
from saev.shards import Shards, extract, parts
from saev.shards.protocol import Metadata
from shards.recording import config, tree

ARCH = "test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights as half of training leaves them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = vit.load("timm", f"{ARCH}/random", image_size=64).module
        return {
            name: (t + 0.01 * torch.randn_like(t)).contiguous()
            for name, t in net.state_dict().items()
        }


def save(state: tp.Mapping[str, torch.Tensor], url: Path) -> str:
    url.parent.mkdir(parents=True, exist_ok=True)
    if url.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), url)
    else:
        torch.save(dict(state), url)
    return str(url)


def pictures(root: Path, n: int = 4) -> Path:
    for i in range(n):
        place = root / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(place)
    return root


# --- Weights -------------------------------------------------------------------------------


def weights(ckpt: str) -> str:
    return vit.load("timm", ckpt, image_size=64).weights


def test_the_checksum_is_of_the_tensors_not_of_the_file(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    own = weights(f"{ARCH}@{save(state, tmp_path / 'a.safetensors')}")
    assert own.startswith("sha256:")
    assert own == weights(f"{ARCH}@{save(state, tmp_path / 'b.pt')}")
    assert own == weights(f"{ARCH}/{tmp_path / 'b.pt'}")
    around = {"state_dict": {f"module.backbone.{k}": t for k, t in state.items()}}
    torch.save(around, tmp_path / "c.pth")
    assert own == weights(f"{ARCH}@{tmp_path / 'c.pth'}")
    backwards = dict(reversed([*state.items(), ("head.weight", torch.zeros(5, 64))]))
    assert own == weights(f"{ARCH}@{save(backwards, tmp_path / 'd.pt')}")
    storage.write_bytes("memory://w/x", (tmp_path / "a.safetensors").read_bytes())
    assert own == weights(f"{ARCH}@memory://w/x")


def test_untrained_weights_have_the_checksum_of_a_file_that_holds_them(tmp_path: Path) -> None:
    net = vit.load("timm", f"{ARCH}/random", image_size=64)
    place = save(net.module.state_dict(), tmp_path / "r.safetensors")
    assert net.weights == weights(f"{ARCH}@{place}")


def test_every_tensor_counts(state: dict[str, torch.Tensor]) -> None:
    before = vit.checkpoints.fingerprint(state)
    for name, tensor in state.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1e-3
        assert vit.checkpoints.fingerprint({**state, name: changed}) != before
    assert vit.checkpoints.fingerprint({**state, "x": torch.zeros(())}) != before
    as_bits = {**state, "cls_token": state["cls_token"].view(torch.int32)}
    assert vit.checkpoints.fingerprint(as_bits) != before


# --- Names of folders ----------------------------------------------------------------------


def wanted(root: Path, **changes: tp.Any) -> Metadata:
    return extract.Recording(config(root, **changes)).wanted


def test_where_weights_lie_does_not_name_shards(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    storage.write_bytes(
        "memory://b/w.bin", Path(save(state, tmp_path / "w.safetensors")).read_bytes()
    )
    places = [
        save(state, tmp_path / "a/w.pt"), str(tmp_path / "w.safetensors"), "memory://b/w.bin",
    ]  # fmt: skip
    names = {wanted(tmp_path / "out", ckpt=f"{ARCH}@{place}").hash for place in places}
    assert len(names) == 1
    other = {**state, "norm.bias": state["norm.bias"] + 1}
    place = save(other, tmp_path / "a/w.pt")
    assert wanted(tmp_path / "out", ckpt=f"{ARCH}@{place}").hash not in names


def write_open_clip(folder: Path, heads: int) -> None:
    """A tiny CLIP as open_clip's push_to_hf_hub writes it; the width of a head is no tensor's."""
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": heads, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    net = open_clip.CLIP(**model_cfg)
    storage.write_json(
        str(folder / "open_clip_config.json"), {"model_cfg": model_cfg, "preprocess_cfg": {}}
    )
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")


def test_a_folder_of_a_model_is_named_by_its_config_and_weights(tmp_path: Path) -> None:
    """Equal tensors in networks of other numbers of heads give other activations."""
    write_open_clip(tmp_path / "a", 32)
    write_open_clip(tmp_path / "b", 16)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    base = {"family": "clip", "image_size": None, "layers": [-1]}
    a, b, c = (wanted(tmp_path, ckpt=f"local-dir:{tmp_path / n}", **base) for n in "abc")
    assert a.weights == b.weights == c.weights
    assert a.hash == c.hash != b.hash


class Saved(tp.NamedTuple):
    """One network of open_clip, saved in two ways."""

    file: Path
    """Its weights alone."""
    vision: dict[str, tp.Any]
    """Its config."""
    folder: tp.Callable[..., str]
    """The checkpoint's name of a folder with its weights, with these changes to its config."""


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    for name, quick in (("saev-tiny", False), ("saev-tiny-quick", True)):
        storage.write_json(str(tmp_path / f"{name}.json"), {**model_cfg, "quick_gelu": quick})
        open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in open_clip.CLIP(**model_cfg).state_dict().items()}
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, file)

    def folder(name: str, **changes: tp.Any) -> str:
        top = {k: changes.pop(k) for k in ("quick_gelu", "text_cfg") if k in changes}
        config = {**model_cfg, **top, "vision_cfg": {**vision, **changes}}
        storage.write_json(
            str(tmp_path / name / "open_clip_config.json"),
            {"model_cfg": config, "preprocess_cfg": {}},
        )
        shutil.copy(file, tmp_path / name / "open_clip_model.safetensors")
        return f"local-dir:{tmp_path / name}"

    return Saved(file, vision, folder)


def source(root: Path, ckpt: str, family: str = "clip") -> ActivationSource:
    size = None if family == "clip" else 64
    return wanted(root, ckpt=ckpt, family=family, image_size=size, layers=[-1]).source()


def test_a_network_is_one_whatever_it_is_called(saved: Saved, tmp_path: Path) -> None:
    by_file = source(tmp_path, f"saev-tiny@{saved.file}")
    for by_folder in (
        source(tmp_path, saved.folder("a")),
        source(tmp_path, saved.folder("b", patch_dropout=0.0, attentional_pool=False)),
    ):
        assert by_folder.network != by_file.network
        assert compare(by_file, by_folder) == compare(by_folder, by_file) == ([], [])
        unknown = by_folder.model_copy(update={"structure": None})
        assert compare(by_file, unknown).refused  # the name is all that is known of the function
    # What open_clip builds for names on a hub, with attributes for the preprocessing.
    model: tp.Any = open_clip.create_model("saev-tiny", load_weights=False)
    assert vit.checkpoints.structure(model.visual.eval()) == by_file.structure


def test_equal_weights_in_another_network_are_refused(saved: Saved, tmp_path: Path) -> None:
    by_file = source(tmp_path, f"saev-tiny@{saved.file}")
    others = [
        source(tmp_path, f"saev-tiny-quick@{saved.file}"),
        source(tmp_path, saved.folder("a", quick_gelu=True)),
        source(tmp_path, saved.folder("b", head_width=16)),
        source(tmp_path, saved.folder("c", norm_kwargs={"eps": 1e-3})),
        source(tmp_path, saved.folder("d", act_kwargs={"approximate": "tanh"})),
    ]
    assert {other.weights for other in others} == {by_file.weights}
    for other in others:
        (refused,) = compare(by_file, other).refused
        assert "(equal weights in other networks, saev-tiny and " in refused
    # The same function in another dress.
    assert compare(others[0], others[1]) == ([], [])


def test_timm_s_two_names_of_one_network(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    first, second, third = (f"saev_test_{name}" for name in ("one", "two", "three"))
    for name, heads in ((first, 2), (second, 2), (third, 4)):
        register_test_vit(name, heads)
    place = save(state, tmp_path / "w.safetensors")
    a, b, c = (source(tmp_path, f"{name}@{place}", "timm") for name in (first, second, third))
    assert a.weights == b.weights == c.weights
    assert len({a.network, b.network, c.network}) == 3
    assert compare(a, b) == ([], [])
    assert "equal weights in other networks" in compare(a, c).refused[0]


def register_test_vit(name: str, heads: int) -> None:
    """An entry point beside timm's own `test_vit`, with so many heads."""

    def entry(pretrained: bool = False, **options: tp.Any) -> torch.nn.Module:
        net = timm.create_model("test_vit", pretrained=pretrained, num_heads=heads, **options)
        net.pretrained_cfg = {**net.pretrained_cfg, "architecture": name}
        return net

    entry.__name__ = name
    entry.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(entry)


def test_where_images_lie_does_not_name_shards(tmp_path: Path, s3: str) -> None:
    first = pictures(tmp_path / "first")
    shutil.copytree(first, tmp_path / "deep/second")
    places = [str(first), str(tmp_path / "deep/second"), f"{s3}/third", "memory://fourth"]
    for place in places[2:]:
        for file in storage.walk(first):
            data = storage.read_bytes(storage.join(first, file.key))
            storage.write_bytes(storage.join(place, file.key), data)
    found = [
        wanted(tmp_path / "out", data={"kind": "img-folder", "root": place}) for place in places
    ]
    assert len({metadata.hash for metadata in found}) == 1
    # metadata.json goes on naming the place.
    assert [m.data["root"] for m in found] == [storage.normalize(place) for place in places]
    (first / "a/0.png").rename(first / "a/00.png")
    again = wanted(tmp_path / "out", data={"kind": "img-folder", "root": places[0]})
    assert again.hash != found[0].hash


def test_where_saved_datasets_lie_does_not_name_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(str(p) for p in pictures(tmp_path / "images").rglob("*.png"))
    rows = datasets.Dataset.from_dict({"image": files, "label": [0, 1, 0, 1]})
    rows = rows.cast_column("image", datasets.Image())
    for place in ("a", "deep/b"):
        rows.save_to_disk(str(tmp_path / place))
    monkeypatch.chdir(tmp_path)
    names = ["a", "./a", str(tmp_path / "a"), "deep/b"]
    found = [wanted(tmp_path / "out", data={"kind": "imagenet", "name": n}).hash for n in names]
    assert len(set(found)) == 1


def test_pictures_are_drawn_from_the_images_at_hand(tmp_path: Path) -> None:
    """A folder of shards that two places have in common names one of them."""
    here, there = pictures(tmp_path / "here"), pictures(tmp_path / "there")
    shards = config(tmp_path / "s/shards", data={"kind": "img-folder", "root": str(here)})
    url = extract.run(shards)
    keys = {k: v for k, v in shards.to_dict().items() if k not in ("data", "shards_root", "part")}
    for place in (here, there):
        file = RunFile.from_dict(
            {"data": {"kind": "img-folder", "root": str(place)}, "shards": keys}
        )
        stages = resolve_stages(file, str(tmp_path / "s"), None, "test")
        assert extract.run(stages.shards) == url
        data = stages.showing("r", url, "m").data
        assert isinstance(data, ImgFolder)
        assert data.root == str(place)


# --- Records of shards ---------------------------------------------------------------------


def test_parts_of_other_weights_never_mix(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The folder is named by the weights; here somebody copies a finished shard into it."""
    place = save(state, tmp_path / "w.safetensors")
    ckpt = f"{ARCH}@{place}"
    first = extract.run(config(tmp_path / "out", ckpt=ckpt, part="1/2"))
    ours = vit.load("timm", ckpt, image_size=64).weights
    save({**state, "norm.bias": state["norm.bias"] + 1}, Path(place))
    second = extract.run(config(tmp_path / "out", ckpt=ckpt, part="2/2"))
    theirs = vit.load("timm", ckpt, image_size=64).weights
    assert first != second
    for name in ("acts000003.bin", "parts/acts000003.bin.part"):
        shutil.copy(Path(second) / name, Path(first) / name)
    save(state, Path(place))
    before = tree(first)
    for part in ("2/2", ""):
        with pytest.raises(ModelError, match=f"with weights {theirs}, but timm .* {ours}"):
            extract.run(config(tmp_path / "out", ckpt=ckpt, part=part))
    metadata = Metadata.read(first)
    with pytest.raises((ModelError, IncompleteError)):
        parts.publish(first, metadata, metadata.n_shards, ours)
    changed = {k for k, v in tree(first).items() if before.get(k) != v}
    assert not any("000003" in k for k in changed)  # nothing was written over


# --- Folders of version 0.1.0 ---------------------------------------------------------------


def as_0_1_0(url: str, **places: tp.Any) -> str:
    """Make of a folder what version 0.1.0 made: its name, its metadata, its records."""
    metadata = Metadata.read(url)
    plain = {**metadata.to_dict(), **places}
    for key in ("network", "weights", "structure", "versions"):
        del plain[key]
    name = storage.content_hash(plain, 16)  # as that version made it, keys and all
    target = Path(url).parent / name
    Path(url).rename(target)
    storage.write_json(str(target / "metadata.json"), plain)
    (target / "files.json").unlink(missing_ok=True)
    shutil.rmtree(target / "asked", ignore_errors=True)
    for shard in range(metadata.n_shards):
        if storage.exists(parts.part_url(str(target), shard)):
            part = parts.read_part(str(target), shard, metadata)
            object.__setattr__(part, "weights", None)
            parts.write_part(str(target), shard, part)
    return str(target)


@pytest.mark.parametrize("part", ["", "1/2"])
def test_an_old_folder_is_used_complete_or_not(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = pictures(tmp_path / "images", 6)
    data = {"kind": "img-folder", "root": str(images)}
    cfg = config(tmp_path / "out", data=data, max_tokens_per_shard=2 * 2 * 17)
    old = as_0_1_0(
        extract.run(cfg.model_copy(update={"part": part})),
        data={"kind": "img-folder", "root": "s3://gone/images"}, dataset="s3://gone/images",
    )  # fmt: skip
    (tmp_path / "out/0123456789abcdef").mkdir()
    (tmp_path / "out/0123456789abcdef/metadata.json").write_text("{")  # damaged: of no concern
    files = {p: p.stat().st_mtime_ns for p in Path(old).glob("acts*")}
    with caplog.at_level(logging.WARNING):
        assert extract.run(cfg) == old
    told = [r for r in caplog.records if "recorded by version 0.1.0" in r.getMessage()]
    assert len(told) == 1
    assert {p: p.stat().st_mtime_ns for p in files} == files
    with Shards.open(old) as shards:
        shards.verify()
        assert shards.n_examples == 6
        assert shards.metadata.hash == storage.name(old)
        assert shards.metadata.weights is None
    other = cfg.model_copy(update={"amp": True})
    assert extract.Recording(other).url != old


def test_an_old_unfinished_folder_takes_one_kind_of_weights(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its name does not tell the weights, the records of its shards do."""
    place = Path(save(state, tmp_path / "w.safetensors"))
    cfg = config(tmp_path / "out", ckpt=f"{ARCH}@{place}")
    old = as_0_1_0(extract.run(cfg.model_copy(update={"part": "1/4"})))
    assert extract.run(cfg.model_copy(update={"part": "2/4"})) == old
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(place, moved)
    assert extract.run(cfg.model_copy(update={"ckpt": f"{ARCH}@{moved}", "part": "3/4"})) == old
    save({**state, "norm.bias": state["norm.bias"] + 1}, place)
    assert extract.Recording(cfg).url != old  # its metadata has the checksum of the file


def test_an_old_folder_of_the_wrong_network_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Version 0.1.0 put OpenAI's weights in a file without a tag into a network with GELU."""
    torch.manual_seed(0)
    reference: tp.Any = open_clip.create_model("ViT-S-32", force_quick_gelu=True)
    state = {f"visual.{k}": t for k, t in reference.visual.state_dict().items()}
    place = save(state | {"vocab_size": torch.tensor(49408)}, tmp_path / "openai.pt")
    right = {"family": "clip", "image_size": 64, "ckpt": f"ViT-S-32@{place}"}
    cfg = config(tmp_path / "out", **right, layers=[-1])
    old = as_0_1_0(extract.run(cfg))
    with caplog.at_level(logging.WARNING):
        new = extract.run(cfg)
    assert new != old
    (told,) = [r.getMessage() for r in caplog.records if old in r.getMessage()]
    assert "which took" in told
    assert "recorded again, as ViT-S-32-quickgelu" in told
    assert Metadata.read(new).network == "ViT-S-32-quickgelu"


def test_names_are_told_from_places() -> None:
    """An old folder of a hub's name with a revision is not one of another revision."""
    plain = vit.checkpoints.without_url
    assert plain("hf-hub:org/name@v1", None) == "hf-hub:org/name@v1"
    assert plain("ViT-B-32/openai@s3://b/w.pt", "crc32c:0") == "ViT-B-32/openai@"
    assert plain("ViT-B-32@/a/w.pt", "crc32c:0") == plain("ViT-B-32//a/w.pt", "crc32c:0")
    assert plain("local-dir:/a", "crc32c:0") == plain("local-dir:s3://b", "crc32c:0")
