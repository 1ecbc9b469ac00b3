"""The whole pipeline: kfp walks it, and every step is a process of its own."""

import builtins
import json
import logging
import re
import threading
import typing as tp
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from described import files_below
from forker import Forker
from PIL import Image

from pipelines import local_run
from pipelines.arguments import RunLocal
from pipelines.errors import RunFailedError
from pipelines.runners import Runner, describe
from saev import storage
from saev.errors import ConfigError

CONFIG = """
[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 64
layers = [-1]
max_tokens_per_shard = 102   # six images: four shards

[train]
n_train = 600
max_parallel = 1             # two SAEs in two groups

[train.sae]
d_sae = 64

[train.train_data]
val_fraction = 0.25

[sweep.sae.activation]
top_k = [2, 4]

[visuals]
n_latents = 1
"""

UNEQUAL = ("tb/", "timings.jsonl")
"""Parts of names of files that hold times."""


class Forked(Runner):
    """Steps as real processes that start in milliseconds, one after the other."""

    def __init__(self, forker: Forker):
        super().__init__()
        self._forker, self._one = forker, threading.Lock()
        self.steps: list[str] = []

    def run(self, image: str, command: list[str], outputs: str) -> int:
        del image, outputs

        with self._one:
            ended = self._forker.run(command[3:])
        self.steps.append(describe(command))
        return self._report(ended.stderr.splitlines(), describe(command), lambda: ended.status)

    def stop(self) -> None:
        raise NotImplementedError


@pytest.fixture
def run_local(
    forker: Forker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Runs a pipeline on the config above; returns the steps that ran."""
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)

    def run(root: str, dataset: str, **more: tp.Any) -> list[str]:
        runner = Forked(forker)
        monkeypatch.setattr(local_run, "_runner", lambda cfg, mounts: runner)
        cfg = RunLocal(
            config=str(config), root=root, dataset=dataset, outputs=str(tmp_path / "kfp"), **more
        )
        before = builtins.print, logging.getLogger().handlers[:]
        assert local_run.run(cfg) == storage.join(root, "index.html")
        # Steps side by side leave kfp's own replacements of them behind.
        assert (builtins.print, logging.getLogger().handlers[:]) == before
        return runner.steps

    return run


def write_images(url: str, n: int = 22) -> None:
    """A folder of two classes."""
    rng = np.random.default_rng(0)
    for i in range(n):
        image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        with storage.open_write(
            storage.join(url, "cats" if i % 2 else "dogs", f"{i:02d}.png")
        ) as f:
            image.save(f, format="png")


def contents(root: str) -> dict[str, bytes]:
    """Everything that has to be equal, by key: not what only a pipeline writes."""
    prefix = len(storage.normalize(root)) + 1
    return {
        url[prefix:]: storage.read_bytes(url)
        for url in files_below(root)
        if not url[prefix:].startswith(("datasets/", "jobs/"))
        and not any(u in url for u in UNEQUAL)
    }


@pytest.fixture(params=["disk", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on either kind of storage."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    return str(tmp_path / "place")


@pytest.mark.slow
def test_its_results_are_those_of_saev_run(
    run_local: Callable[..., list[str]], base: str, forker: Forker, tmp_path: Path
) -> None:
    dataset, root = storage.join(base, "images"), storage.join(base, "out")
    write_images(dataset)
    steps = run_local(root, dataset)
    found = contents(root)
    assert sum("part " in step for step in steps if step.startswith("extract")) == 2
    assert sum(step.startswith("train") for step in steps) == 2
    assert sum(step.startswith("summarise") for step in steps) == 1  # of at most half of n_parts

    storage.delete(root, recursive=True)
    command = ["run", "--config", str(tmp_path / "run.toml"), "--root", root]
    ended = forker.run([*command, "data:img-folder", "--data.root", dataset])
    assert ended.status == 0, ended.stderr
    expected = contents(root)
    assert sorted(found) == sorted(expected)
    assert [key for key in expected if found[key] != expected[key]] == []

    # What is there is not made again.
    again = run_local(root, dataset)
    assert again == ["discover", "plan", "publish", "report", "outcome"]
    assert contents(root) == expected


@pytest.mark.slow
def test_what_the_ui_shows(run_local: Callable[..., list[str]], tmp_path: Path) -> None:
    dataset, root = str(tmp_path / "images"), str(tmp_path / "out")
    write_images(dataset)
    run_local(root, dataset)
    kfp = tmp_path / "kfp"
    (book,) = kfp.rglob("picture_book")  # one pod summarises both SAEs
    pictured = re.findall(r"&quot;nPictured&quot;:([0-9]+)", book.read_text())
    assert len(pictured) == 2
    assert all(map(int, pictured)), "both pages have pictures"
    assert all(f"topk{k}-s" in book.read_text() for k in (2, 4))
    for page in (book, *kfp.rglob("sae_overview")):
        html = page.read_text()
        assert html.startswith("<!doctype html>")
        assert 'src="latents/' not in html, "nothing beside it can be loaded"
        links = re.findall(r'href="(.)', html)
        assert set(links) <= {"#", "d"}, "the frame opens no windows: places in it, and data"
    (table,) = kfp.rglob("sae_table")
    assert "2 sparse autoencoders of images" in table.read_text()
    figures = [
        json.loads(path.read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
        for path in sorted(kfp.rglob("summarise/executor_output.json"))
    ]
    (said,) = figures
    assert (said["dataset"], said["n_saes"]) == ("images", 2)
    assert all(f", L0 {k}.0, " in said[f"topk{k}-s64"] for k in (2, 4))


@pytest.mark.slow
def test_what_is_new_below_a_prefix(run_local: Callable[..., list[str]], base: str) -> None:
    incoming, root = storage.join(base, "incoming"), storage.join(base, "out")
    for name in ("a", "b"):
        write_images(storage.join(incoming, name), n=12 if name == "a" else 14)
    fire = {"pipeline": "saev-incoming", "param": ["settle_minutes=0", "marker=_SUCCESS"]}
    storage.write_bytes(storage.join(incoming, "a", "_SUCCESS"), b"")
    assert sum(step == "report" for step in run_local(root, incoming, **fire)) == 1
    assert run_local(root, incoming, **fire) == ["fire"]
    storage.write_bytes(storage.join(incoming, "b", "_SUCCESS"), b"")
    assert sum(step == "report" for step in run_local(root, incoming, **fire)) == 1
    html = storage.read_text(storage.join(root, "index.html"))
    assert storage.join(incoming, "a") in html
    assert storage.join(incoming, "b") in html


@pytest.mark.slow
def test_a_step_that_fails_fails_the_run_and_the_next_one_goes_on(
    run_local: Callable[..., list[str]], tmp_path: Path
) -> None:
    dataset, root = tmp_path / "images", str(tmp_path / "out")
    write_images(str(dataset))
    damaged = sorted(dataset.rglob("*.png"))[0]
    good = damaged.read_bytes()
    damaged.write_bytes(good[:100].ljust(len(good), b"\0"))
    with pytest.raises(RunFailedError, match=rf"extract: part 1 of 2 ended .*{damaged.name}"):
        run_local(root, str(dataset))
    (record,) = (Path(root) / "datasets" / "runs").glob("*.json")
    assert json.loads(record.read_text())["failed"] == ["images"]
    damaged.write_bytes(good)
    steps = run_local(root, str(dataset))
    assert steps[-2:] == ["report", "outcome"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "/nowhere"}, "/nowhere"),
        ({"param": ["n_part=2"]}, "n_part"),
        ({"config": "/nowhere.toml"}, "/nowhere.toml"),
    ],
)
def test_mistakes_stop_before_anything_starts(
    changes: dict[str, tp.Any], message: str, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    (tmp_path / "images").mkdir()
    values = {"config": str(config), "dataset": str(tmp_path / "images"), **changes}
    cfg = RunLocal(root=str(tmp_path / "out"), outputs=str(tmp_path / "kfp"), **values)
    with pytest.raises((ConfigError, storage.StorageError), match=message):
        local_run.run(cfg)
    assert not (tmp_path / "out" / "datasets").exists()
