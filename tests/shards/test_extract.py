"""The stage: what it records, in which pieces, with which errors, and that nothing changes bits."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from described import files_below
from forker import Forker
from PIL import Image
from test_storage import can_mount
from torch import Tensor

from saev import driver, storage, vit
from saev.config import ShardsConfig
from saev.errors import (
    ConfigError,
    CorruptDataError,
    ImageError,
    IncompleteError,
    ModelError,
    SaevError,
    StorageError,
)
from saev.images import open_dataset
from saev.shards import Shards, extract, parts
from shards.recording import MODEL, config, tree


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an undisturbed run of `config`."""
    root = tmp_path_factory.mktemp("reference")
    extract.run(config(root))
    return tree(root)


def independent(cfg: ShardsConfig) -> Tensor:
    """Activations [n_layers, n_examples, tokens, d_model], by timm's own means."""
    model = vit.load(cfg.family, cfg.ckpt, image_size=cfg.image_size)
    dataset = open_dataset(cfg.data)
    images = torch.stack([model.spec.apply(dataset.load(i)) for i in range(len(dataset))])
    layers = sorted(layer % model.n_layers for layer in cfg.layers)
    plain: timm.models.VisionTransformer = model.module
    outputs = plain.forward_intermediates(
        images, indices=layers, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    return torch.stack([torch.cat([special, content], dim=1) for content, special in outputs])


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_records_what_the_model_computes(tmp_path: Path, dtype: str, cls_token: bool) -> None:
    cfg = config(tmp_path, dtype=dtype, cls_token=cls_token)
    shards = Shards.open(extract.run(cfg))
    expected = independent(cfg)[:, :, 0 if cls_token else 1 :]
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    assert shards.layers == (1, 5)
    for index, layer in enumerate(shards.layers):
        got = torch.cat(
            [shards.read(s, layer, 0, i.n_examples) for s, i in enumerate(shards.infos)]
        )
        assert got.dtype == getattr(torch, dtype)
        torch.testing.assert_close(got.float(), expected[index], rtol=tolerance, atol=tolerance)
    shards.verify()


def test_examples_and_labels(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    shards = Shards.open(extract.run(cfg))
    dataset = open_dataset(cfg.data)
    rows = shards.examples().to_pylist()
    assert [row["index"] for row in rows] == list(range(17))
    for row in rows:
        info = dataset.example(row["index"])
        assert (row["url"], row["label"], row["target"]) == info
        assert (row["height"], row["width"]) == (48, 48)
    labels = shards.labels()
    assert labels is not None
    assert labels.shape == (17, 16)
    assert len(np.unique(labels)) > 1
    names = {name for name in os.listdir(shards.url) if not name.startswith("acts")}
    assert names == {
        "metadata.json", "shards.json", "examples.parquet", "labels.bin", "stats.safetensors",
        "checksums.bin", "files.json", "asked",
    }  # fmt: skip


def test_no_masks_no_labels(tmp_path: Path) -> None:
    url = extract.run(config(tmp_path, data={"kind": "fake-img", "n_examples": 3}))
    assert Shards.open(url).labels() is None
    assert not storage.exists(storage.join(url, "labels.bin"))


@pytest.mark.parametrize("amp", [False, True])
def test_nothing_but_the_work_decides_the_bytes(tmp_path: Path, amp: bool) -> None:
    """Threads, workers and batch sizes leave the folder's name and every byte as they are."""
    before = torch.get_num_threads()
    trees = []
    for i, (threads, batch_size, n_workers) in enumerate([(1, 1, 1), (3, 5, 4), (2, 100, 2)]):
        torch.set_num_threads(threads)
        try:
            root = tmp_path / str(i)
            extract.run(config(root, amp=amp, batch_size=batch_size, n_workers=n_workers))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        trees.append(tree(root))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("of", [1, 3, 6])
def test_parts_in_any_order(tmp_path: Path, reference: dict[str, bytes], of: int) -> None:
    """More parts than shards leave some empty; the command without --part publishes."""
    for number in sorted(range(1, of + 1), key=lambda i: (i * 5) % 7):
        url = extract.run(config(tmp_path, part=f"{number}/{of}"))
        assert not storage.exists(storage.join(url, "shards.json"))
        with pytest.raises(IncompleteError):
            Shards.open(url)
    written = {u: Path(u).stat().st_mtime_ns for u in files_below(url) if "acts" in u}
    assert extract.run(config(tmp_path)) == url
    assert tree(tmp_path) == reference
    for acts, when in written.items():  # nothing was recorded a second time
        if "parts" not in acts:
            assert Path(acts).stat().st_mtime_ns == when


def test_without_part_does_what_is_missing(tmp_path: Path, reference: dict[str, bytes]) -> None:
    extract.run(config(tmp_path, part="2/3"))
    extract.run(config(tmp_path))
    assert tree(tmp_path) == reference


def test_work_items_one_by_one(tmp_path: Path, reference: dict[str, bytes]) -> None:
    cfg = config(tmp_path)
    items = extract.Recording(cfg).items()
    assert [(i["start"], i["stop"]) for i in (item.spec for item in items)] == [
        (0, 5),
        (5, 10),
        (10, 15),
        (15, 17),
    ]
    for item in reversed(items):
        with pytest.raises(IncompleteError, match=r"acts000000\.bin of .* is not recorded yet"):
            driver.finish(extract.Recording(cfg))
        driver.do_items(extract.Recording(cfg), [item])
    with pytest.raises(ConfigError, match="no shard 4: there are 4"):
        extract.Recording(cfg).item(4)
    (url,) = driver.finish(extract.Recording(cfg)).urls
    assert tree(tmp_path) == reference
    driver.do_items(extract.Recording(cfg), items[:1])  # late: a no-op
    assert driver.finish(extract.Recording(cfg)).urls == (url,)
    assert tree(tmp_path) == reference


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_other_storage(
    tmp_path: Path, reference: dict[str, bytes], place: str, request: pytest.FixtureRequest
) -> None:
    root = "memory://extract" if place == "memory" else f"{request.getfixturevalue('s3')}/extract"
    scratch = set(os.listdir("/tmp"))
    extract.run(config(root, part="1/2"))
    url = extract.run(config(root))
    found = {
        storage.name(url) + u.removeprefix(url): storage.read_bytes(u) for u in files_below(url)
    }
    assert found == reference
    assert extract.run(config(root)) == url
    assert not [n for n in set(os.listdir("/tmp")) - scratch if "acts" in n]


def test_a_published_folder_is_left_alone_and_tidied(tmp_path: Path) -> None:
    url = extract.run(config(tmp_path))
    before = tree(tmp_path)
    when = {u: Path(u).stat().st_mtime_ns for u in files_below(url)}
    storage.write_bytes(parts.part_url(url, 2), b"left by a pod that was killed")
    (Path(url) / f"{storage.TMP_PREFIX}acts").write_bytes(b"so is this")
    assert extract.run(config(tmp_path)) == url
    assert tree(tmp_path) == before
    assert {u: Path(u).stat().st_mtime_ns for u in files_below(url)} == when
    (Path(url) / "acts000003.bin").unlink()
    with pytest.raises(CorruptDataError, match=r"acts000003\.bin is missing"):
        extract.run(config(tmp_path))


@pytest.mark.parametrize("damage", ["flip", "cut", "acts cut", "acts gone"])
def test_damaged_pieces_are_recorded_again(
    tmp_path: Path, reference: dict[str, bytes], damage: str
) -> None:
    url = extract.run(config(tmp_path, part="1/1"))
    record, acts = Path(parts.part_url(url, 1)), Path(url) / "acts000001.bin"
    data = record.read_bytes()
    if damage == "flip":
        record.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
    elif damage == "cut":
        record.write_bytes(data[:-1])
    elif damage == "acts cut":
        acts.write_bytes(acts.read_bytes()[:-1])
    else:
        acts.unlink()
    with pytest.raises(CorruptDataError, match=r"acts000001\.bin"):
        driver.finish(extract.Recording(config(tmp_path)))
    extract.run(config(tmp_path))
    assert tree(tmp_path) == reference


# --- Unreadable images ---------------------------------------------------------------------


def folder(root: Path, n: int, bad: set[int]) -> dict[str, str]:
    (root / "a").mkdir(parents=True)
    for i in range(n):
        path = root / "a" / f"{i:02d}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:60])
    return {"kind": "img-folder", "root": str(root)}


def test_an_unreadable_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", 12, {7})
    with pytest.raises(ImageError, match=r"images/a/07\.png.*--skip-unreadable"):
        extract.run(config(tmp_path / "out", data=data))
    # What came before it is kept; the image is mended; the same command goes on.
    (folder_,) = (tmp_path / "out").iterdir()
    assert (folder_ / "parts" / "acts000000.bin.part").exists()
    assert not list(folder_.glob(f"{storage.TMP_PREFIX}*"))


@pytest.mark.parametrize("bad", [{0}, {4, 5}, {0, 1, 2, 3, 4}, {10, 11}, {5, 6, 7, 8, 9, 10, 11}])
def test_skipped_images_leave_no_gap(tmp_path: Path, bad: set[int]) -> None:
    data = folder(tmp_path / "images", 12, bad)
    kept = [i for i in range(12) if i not in bad]
    cfg = config(tmp_path / "out", data=data, skip_unreadable=True)
    shards = Shards.open(extract.run(cfg))
    counts = [sum(i in kept for i in r) for r in (range(5), range(5, 10), range(10, 12))]
    assert [info.n_examples for info in shards.infos] == counts
    for info, n in zip(shards.infos, counts, strict=True):
        assert storage.size(storage.join(shards.url, info.name)) == n * 2 * 17 * 64 * 4
    shards.verify()
    rows = shards.examples().to_pylist()
    assert [row["index"] for row in rows] == kept
    assert [row["height"] for row in rows] == [20 + i for i in kept]
    listed = storage.read_json(storage.join(shards.url, "skipped.json"))
    assert [row["index"] for row in listed] == sorted(bad)
    for row in listed:
        assert row["url"].endswith(f"a/{row['index']:02d}.png")
        assert f"{row['index']:02d}.png" in row["reason"]
    # Each kept image has the activations that it has without the others.
    model = vit.load(cfg.family, cfg.ckpt, image_size=64)
    dataset = open_dataset(cfg.data)
    for example, index in enumerate(kept):
        expected = model.record(model.spec.apply(dataset.load(index))[None], [1, 5])
        shard, i = shards.locate(example)
        for k, layer in enumerate((1, 5)):
            got = shards.read(shard, layer, i, i + 1)
            torch.testing.assert_close(got, expected[k], rtol=1e-4, atol=1e-5)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", 3, {0, 1, 2})
    with pytest.raises(ImageError, match=r"None of the 3 images could be decoded; .*00\.png"):
        extract.run(config(tmp_path / "out", data=data, skip_unreadable=True))


# --- Mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3", " "])
def test_wrong_part(tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigError, match=r"--part is .*, expected I/N"):
        extract.run(config(tmp_path, part=part))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": [6]}, ModelError, "Layer 6 does not exist: the model has 6 blocks"),
        ({"layers": [-7]}, ModelError, "Layer -7 does not exist"),
        ({"layers": [5, -1]}, ModelError, "same block"),
        ({"layers": []}, ModelError, "No layer"),
        ({"d_model": 65}, ModelError, "65.*64"),
        ({"content_tokens_per_example": 100}, ModelError, "100.*16"),
        ({"family": "clipp"}, ModelError, "Unknown model family 'clipp'. Did you mean clip\\?"),
        ({"ckpt": "no_such_vit/random"}, ModelError, "no_such_vit"),
        ({"device": "tpu"}, ConfigError, "--device tpu cannot be used"),
        ({"device": "cuda:99"}, ConfigError, "--device cuda:99 cannot be used"),
        ({"data": {"kind": "img-folder", "root": "/no/such"}}, StorageError, "/no/such"),
    ],
)
def test_mistakes_are_one_clear_error(
    tmp_path: Path, changes: dict, error: type[SaevError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        extract.run(config(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {}


def test_an_activation_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, dtype="float16")
    model = extract.Recording(cfg).model
    with torch.no_grad():
        model.module.blocks[5].mlp.fc2.bias[3] = 1e6  # float16 ends at 65504
    monkeypatch.setattr(vit, "load", lambda *args, **kwargs: model)
    message = r"Layer 5 of timm test_vit/random is NaN or infinite for example 0 of acts000000\.bin"
    with pytest.raises(ModelError, match=message):
        extract.run(cfg)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        extract.run(config(tmp_path / "file"))


FULL = """
import ctypes, os, shutil, sys
disk, copy, size, filler = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
assert not libc.unshare(0x10000000 | 0x20000), "CLONE_NEWUSER | CLONE_NEWNS"
for name, text in ("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1"):
    with open(f"/proc/self/{name}", "w") as handle:
        handle.write(text)
assert not libc.mount(b"none", disk.encode(), b"tmpfs", 0, b"size=%d" % size), "mount"

from shards.recording import config
from saev.errors import StorageError
from saev.shards import extract
cfg = config(disk)
with open(disk + "/filler", "wb") as handle:
    handle.write(bytes(int(filler)))
try:
    extract.run(cfg)
except StorageError as err:
    print(err)
os.unlink(disk + "/filler")
print(extract.run(cfg))
shutil.copytree(disk, copy)
"""


@can_mount
def test_a_full_disk_and_the_same_command_afterwards(
    tmp_path: Path, reference: dict[str, bytes], forker: Forker
) -> None:
    """On a disk of its own, which only the process that mounts it sees."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    size, filler = 1 << 20, (1 << 20) - 150_000  # room for one shard of 87 kB, not for two
    first, _url = forker.output(FULL, disk, copy, size, filler).splitlines()
    assert "no space left on the device. Free some space and run the same command again" in first
    assert tree(copy) == reference
    assert tree(disk) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_end_is_prompt_and_leaves_no_temporaries(
    forker: Forker, tmp_path: Path, number: signal.Signals
) -> None:
    command = [
        "shards", "--shards-root", str(tmp_path), "--family", MODEL["family"],
        "--ckpt", MODEL["ckpt"], "--layers", "1", "--device", "cpu",
        "data:fake-img", "--data.n-examples", "100000",
    ]  # fmt: skip
    pid = forker.start(command)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"*/{storage.TMP_PREFIX}*-acts*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = time.monotonic()
    os.kill(pid, number)
    ended = forker.wait(pid)
    assert time.monotonic() - started < 20
    assert ended.status == 128 + number
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert not [p for p in tmp_path.glob("*/*") if p.name.startswith(storage.TMP_PREFIX)]


# --- Names ---------------------------------------------------------------------------------


def test_what_changes_bytes_changes_the_name(tmp_path: Path) -> None:
    def name(**changes: object) -> str:
        return extract.Recording(config(tmp_path, **changes)).wanted.hash

    same = [
        {}, {"n_workers": 7}, {"batch_size": 3}, {"part": "1/2"}, {"shards_root": "s3://other/x"},
        {"d_model": 64}, {"content_tokens_per_example": 16}, {"layers": [1, 5]}, {"device": "auto"},
    ]  # fmt: skip
    assert len({name(**changes) for changes in same}) == 1
    different = [
        {}, {"layers": [1]}, {"layers": [5, 1]}, {"cls_token": False}, {"dtype": "float16"},
        {"image_size": 96}, {"max_tokens_per_shard": 99}, {"amp": True}, {"skip_unreadable": True},
        {"ckpt": "test_vit2/random"},
        {"data": {"kind": "fake-img-seg", "n_examples": 17, "image_size": 48, "seed": 1}},
    ]  # fmt: skip
    assert len({name(**changes) for changes in different}) == len(different)


def test_the_name_follows_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path / "images", 2, set())
    first = extract.Recording(config(tmp_path, data=data)).metadata
    monkeypatch.chdir(tmp_path)
    relative = {"kind": "img-folder", "root": "./images"}
    assert extract.Recording(config(tmp_path, data=relative)).metadata.hash == first.hash
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a" / "x.png")
    assert extract.Recording(config(tmp_path, data=data)).metadata.hash != first.hash
