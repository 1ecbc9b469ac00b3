"""The reports of several SAEs in one call: each image is decoded once; each report is as alone."""

import collections
import json
import shutil
import threading
import typing as tp
from pathlib import Path

import pytest
from inference.world import contents

from saev import cli, inference, storage, visuals
from saev.config import DataConfig, InferenceConfig, VisualsCommand, VisualsConfig
from saev.errors import ConfigError, SaevError
from saev.images.folders import SegFolder
from saev.visuals import views
from saev.visuals.stored import Stored
from saev.visuals.views import Views
from visuals.chain import D_MODEL, DEAD, Chain, make_run

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def measured(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that are measured, and of which no pictures are drawn."""
    folder = tmp_path_factory.mktemp("many") / "runs"
    for seed, name in enumerate(NAMES, start=1):
        run = str(folder / name)
        make_run(run, chain.shards, D_MODEL, seed)
        config = storage.read_bytes(storage.join(run, "config.json"))
        listed = {"config.json": storage.Listed.of(config)}
        storage.write_json(storage.join(run, "run.json"), storage.seal({}, listed))
        data = DataConfig(shards=chain.shards)
        inference.run(InferenceConfig(run=run, data=data, n_dists=2, device="cpu"))
    return folder


def configs(chain: Chain, runs: Path) -> list[VisualsConfig]:
    return [chain.config(run=str(runs / name), latents=(DEAD, 1)) for name in NAMES]


def reports(runs: Path) -> dict[str, dict[str, bytes]]:
    """All that was drawn of each run, without the names of the run's place."""
    found = {}
    for name in NAMES:
        (report,) = (runs / name / "inference").glob("*/report")
        made = contents(str(report))
        done = json.loads(made.pop("visuals.json"))
        made["index.html"] = made["index.html"].replace(str(runs).encode(), b"RUNS")
        assert done["config"]["run"] == str(runs / name)
        found[name] = made | {"latents": json.dumps(done["latents"]).encode()}
    return found


@pytest.fixture(scope="module")
def alone(chain: Chain, measured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    runs = tmp_path_factory.mktemp("alone") / "runs"
    shutil.copytree(measured, runs)
    for cfg in configs(chain, runs):
        visuals.run(cfg)
    return reports(runs)


@pytest.fixture
def runs(measured: Path, tmp_path: Path) -> Path:
    """A copy, in which nothing is drawn."""
    shutil.copytree(measured, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[int]:
    """How often each image was decoded."""
    found: collections.Counter[int] = collections.Counter()
    load = SegFolder.load

    def counted(self: SegFolder, index: int) -> tp.Any:
        found[index] += 1
        return load(self, index)

    monkeypatch.setattr(SegFolder, "load", counted)
    return found


def test_each_image_is_decoded_once(
    chain: Chain, runs: Path, alone: dict, decoded: collections.Counter[int]
) -> None:
    urls = visuals.run_all(configs(chain, runs))
    assert [Path(url).parents[3].name for url in urls] == list(NAMES)
    assert set(decoded.values()) == {1}
    assert reports(runs) == alone
    decoded.clear()
    assert visuals.run_all(configs(chain, runs)) == urls
    assert not decoded


def test_no_room_for_images(
    chain: Chain,
    runs: Path,
    alone: dict,
    decoded: collections.Counter[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "_KEPT_BYTES", 0)
    visuals.run_all(configs(chain, runs))
    assert max(decoded.values()) > 1
    assert reports(runs) == alone


def test_saes_fail_alone(chain: Chain, measured: Path, runs: Path, alone: dict) -> None:
    cfgs = configs(chain, runs)
    (results,) = (runs / "b" / "inference").glob("*/examples.parquet")
    results.write_bytes(results.read_bytes()[:-1])
    missing = cfgs[0].model_copy(update={"run": str(runs / "nothing")})
    with pytest.raises(SaevError) as raised:
        visuals.run_all([*cfgs, missing])
    said = str(raised.value)
    assert said.startswith("2 of 4 SAEs failed. ")
    assert str(results) in said
    assert str(runs / "nothing") in said
    assert not list((runs / "b").rglob("index.html"))
    shutil.rmtree(runs / "b")
    shutil.copytree(measured / "b", runs / "b")
    drawn = {p: p.stat().st_mtime_ns for name in ("a", "c") for p in (runs / name).rglob("*")}
    visuals.run_all(cfgs)
    assert reports(runs) == alone
    assert all(path.stat().st_mtime_ns == time for path, time in drawn.items())


def test_the_command_draws_all(chain: Chain, runs: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(
        ["visuals", "--runs", str(runs), "--shards", chain.shards, "--n-latents", "1",
         "--log-freq-range", "-6", "0", "--n-top", "2"]
    )  # fmt: skip
    said = capsys.readouterr()
    assert [Path(url).parents[3].name for url in said.out.split()] == list(NAMES)
    assert "images for 72 latents of 3 SAEs" in said.err


def test_what_is_for_one_sae_alone(runs: Path) -> None:
    for name in ("inference", "out"):
        cfg = VisualsCommand.from_dict({"runs": str(runs), "shards": "s", name: "/x"})
        with pytest.raises(ConfigError, match=f"--{name} is one folder, but there are 3 SAEs"):
            cfg.configs()


# --- Views ---------------------------------------------------------------------------------------


def stored(example: int) -> Stored:
    return Stored(1, 1, bytes([example]), b"")


def test_threads_wait_for_one_that_loads() -> None:
    loading, go_on, n = threading.Event(), threading.Event(), []

    def load(example: int) -> Stored:
        n.append(example)
        loading.set()
        assert go_on.wait(60)
        return stored(example)

    found: list[Stored] = []
    images = Views(load)
    images.expect([7, 7, 7])
    threads = [threading.Thread(target=lambda: found.append(images.get(7))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert loading.wait(60)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert n == [7]
    assert len(found) == 3
    assert not images._kept


def test_an_error_is_one_of_every_use() -> None:
    def load(example: int) -> Stored:
        raise ConfigError(f"{example} is broken")

    images = Views(load)
    images.expect([1, 1])
    for _ in range(2):
        with pytest.raises(ConfigError, match="1 is broken"):
            images.get(1)
