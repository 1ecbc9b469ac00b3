"""Every stage of the chain passes the same checks."""

import json
import os
import shutil
import signal
import typing as tp
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from shards.recording import tree
from test_two_workers import in_the_middle

from saev import chain, driver, run, storage
from saev.config.run import RunConfig
from saev.config.stages import Stages
from saev.errors import ConfigError, IncompleteError
from saev.stage import Job, Part
from saev.visuals import sheet

FILE = {
    "data": {"kind": "fake-img-seg", "n_examples": 12, "image_size": 32},
    "shards": {
        "family": "timm", "ckpt": "test_vit/random", "image_size": 32, "layers": [-1],
        "max_tokens_per_shard": 20, "device": "cpu", "n_workers": 1,
    },
    "train": {"n_train": 200, "max_parallel": 1, "device": "cpu", "sae": {"d_sae": 32}},
    "sweep": {"sae": {"activation": {"top_k": [2, 4]}}},
    "inference": {"device": "cpu", "n_top": 2},
    "visuals": {"log_freq_range": [-9, 0], "log_value_range": [-9, 9], "n_latents": 3, "n_top": 2},
}  # fmt: skip
NAMES = [stage.name for stage in chain.STAGES]


class World:
    """A root, put back to the state before or after a stage whenever a test wants it."""

    def __init__(self, folder: Path):
        self.root, self._states = folder / "root", folder / "states"
        place = folder / "run.json"
        place.write_text(json.dumps(FILE))
        cfg = RunConfig(config=str(place), root=str(self.root))
        self._stages: Stages = run.resolve(cfg)
        self._found: dict[str, list[dict[str, str]]] = {}
        """What each job of a stage reads, by the stage's name."""
        self.root.mkdir()
        self._keep("begin")
        here: list[dict[str, str]] = [{}]
        for stage in chain.STAGES:
            self._found[stage.name] = here
            urls = [driver.run_job(job).urls for job in self.jobs(stage.name)]
            here = [
                {**found, stage.name: u} for found, us in zip(here, urls, strict=True) for u in us
            ]
            self._keep(stage.name)

    def _keep(self, name: str) -> None:
        shutil.copytree(self.root, self._states / name)

    def jobs(self, name: str) -> list[Job]:
        """The jobs of a stage, opened anew."""
        (stage,) = (stage for stage in chain.STAGES if stage.name == name)
        return [stage.of(self._stages, found) for found in self._found[name]]

    def before(self, name: str) -> None:
        """Put back what was there before a stage."""
        self._put(["begin", *NAMES][NAMES.index(name)])

    def after(self, name: str) -> None:
        """Put back what was there after a stage."""
        self._put(name)

    def _put(self, state: str) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self._states / state, self.root)

    def contents(self) -> dict[str, bytes]:
        """Every file but those that hold wall times."""
        return comparable(tree(self.root))

    def expected(self, name: str) -> dict[str, bytes]:
        """The same of a stage that nothing disturbed."""
        return comparable(tree(self._states / name))


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: d for n, d in files.items() if "/tb/" not in n and "timings" not in n}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheet, "_PART_IMAGES", 5)
        yield World(tmp_path_factory.mktemp("world"))
    torch.set_num_threads(n_threads)


def dies(do: Callable[[], object], at: int) -> bool:
    """Do something in a fork that is killed before it gives a file its name for the at-th time."""
    pid = os.fork()
    if pid == 0:
        status, replace, n = 1, os.replace, 0

        def last_act(*args: tp.Any, **kwargs: tp.Any) -> None:
            nonlocal n
            n += 1
            if n > at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args, **kwargs)

        os.replace = last_act
        try:
            do()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_and_run_again(world: World, name: str) -> None:
    killed = 0
    for at in (0, 2, 5, 9):
        world.before(name)
        killed += dies(lambda: [driver.run_job(job) for job in world.jobs(name)], at)
        for job in world.jobs(name):
            driver.run_job(job)
        assert world.contents() == world.expected(name), f"killed before name {at}"
    assert killed >= 3


@pytest.mark.parametrize("name", NAMES)
def test_two_workers(world: World, name: str) -> None:
    world.before(name)
    for job, twin in zip(world.jobs(name), world.jobs(name), strict=True):
        said: list[object] = []
        driver.run_job(
            job, progress=in_the_middle(lambda j=twin, s=said: s.append(driver.run_job(j)), 1)
        )
        assert said, "the twin did not run"
    assert world.contents() == world.expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_parts_in_any_order(world: World, name: str) -> None:
    world.before(name)
    for number in (3, 1, 2):
        for job in world.jobs(name):
            urls = driver.run_job(job, f"{number}/3").urls
            assert urls == job.urls
    for job in world.jobs(name):
        driver.run_job(job)
    assert world.contents() == world.expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_is_missing_is_named(world: World, name: str) -> None:
    world.before(name)
    job = world.jobs(name)[0]
    driver.do_items(job, Part(1, 2).slice(job.items()))
    with pytest.raises(IncompleteError):
        driver.finish(job)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do_opens_no_model(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.after(name)

    def refuse(*args: object, **kwargs: object) -> tp.NoReturn:
        raise AssertionError("opened")

    for opener in ("vit.load", "nn.io.load.load_sae", "inference.job.load_sae",
                   "train.stage.Trainer", "visuals.views.Source"):  # fmt: skip
        monkeypatch.setattr(f"saev.{opener}", refuse)
    for job in world.jobs(name):
        assert all(map(storage.exists, driver.run_job(job).urls))
    for job in world.jobs(name):
        driver.run_job(job, "1/2")
    assert world.contents() == world.expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_results_of_earlier_versions_are_found(world: World, name: str) -> None:
    """They do not say which questions they answer; after that, they do."""
    world.after(name)
    for job in world.jobs(name):
        for url in job.urls:
            shutil.rmtree(Path(url) / "asked", ignore_errors=True)
    for job in world.jobs(name):
        driver.run_job(job)
    assert world.contents() == world.expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_items_and_keys_do_not_depend_on_what_is_done(world: World, name: str) -> None:
    found = []
    for state in (world.before, world.after):
        state(name)
        jobs = world.jobs(name)
        found.append([(job.key, job.urls, list(job.items())) for job in jobs])
        items = [item for job in jobs for item in job.items()]
        assert all(
            item.cost > 0 and json.loads(json.dumps(item.spec)) == item.spec for item in items
        )
        assert len({item.name for item in jobs[0].items()}) == len(jobs[0].items()) > 1
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "1/2/3", "-1/2", "²/3"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ConfigError, match="expected I/N with I from 1 to N"):
        Part.parse(text)


def test_parts_are_slices_of_all_items() -> None:
    for n in range(8):
        for of in range(1, 10):
            parts = [Part(i, of).slice(range(n)) for i in range(1, of + 1)]
            assert [item for part in parts for item in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
