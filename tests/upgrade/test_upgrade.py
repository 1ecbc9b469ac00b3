"""A storage root of version 0.1.0: everything is found, and nothing is computed anew.

root/ was written by write_root.py beside it. What this version trains or draws anew on purpose
stands in CHANGELOG, and in the constants below.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from walk import Walk

import saev
from saev import cli, storage, train
from saev.config import TrainConfig
from saev.errors import ConfigError
from saev.inference.results import Results
from saev.shards import Shards
from saev.steps import jobs

HERE = Path(__file__).parent / "root"
CONFIG = (HERE / "config.json").read_text()


@pytest.fixture(scope="module")
def uploaded(s3: str) -> Iterator[dict[str, str]]:
    """Entity tags of the old root's files, which are on an S3 server."""
    place = f"{s3}/upgrade"
    for path in HERE.rglob("*"):
        if path.is_file():
            restore(place, str(path.relative_to(HERE)))
    yield {o.key: o.etag for o in storage.walk(place)}
    storage.delete(place, recursive=True)


@pytest.fixture
def base(s3: str, uploaded: dict[str, str]) -> Iterator[str]:
    """The old root, under the URL that it was written under; what a test changes is put right."""
    place = f"{s3}/upgrade"
    yield place
    found = {o.key: o.etag for o in storage.walk(place)}
    for key in found.keys() - uploaded.keys():
        storage.delete(storage.join(place, key))
    for key, etag in uploaded.items():
        if found.get(key) != etag:
            restore(place, key)


def restore(place: str, key: str) -> None:
    """Write a file of the old root to the server."""
    storage.write_bytes(storage.join(place, key), (HERE / key).read_bytes())


def contents(url: str) -> dict[str, bytes]:
    """Every object below a URL, by key."""
    return {o.key: storage.read_bytes(storage.join(url, o.key)) for o in storage.walk(url)}


def walk_of(base: str, to: Path) -> Walk:
    return Walk(storage.join(base, "saev"), CONFIG, to, owner="firing-2")


def kinds(urls: list[str]) -> list[str]:
    """Activations of the runs, in order."""
    configs = [storage.read_json(storage.join(url, "config.json")) for url in urls]
    return [config["sae"]["activation"]["kind"] for config in configs]


def old_runs(base: str) -> dict[str, str]:
    """URLs of the sweep's runs of version 0.1.0 by kind of activation."""
    entries = storage.list_dir(storage.join(base, "saev/runs"))
    urls = [e.url for e in entries if storage.exists(storage.join(e.url, "run.json"))]
    sweep = [u for u in urls if storage.read_json(f"{u}/config.json")["val_data"]["layer"] == 5]
    found = {k: u for u, k in zip(sweep, kinds(sweep), strict=True) if not u.endswith(LABELLED)}
    return found


LABELLED = "09900f1548f0"
"""The run of the labelled dataset."""
TRAINED_ANEW = {"batch-top-k", "jump-relu"}
"""Activations whose training changed (see CHANGELOG): asked for again, they are trained again."""


def test_a_schedule_knows_what_it_has_processed(base: str, tmp_path: Path) -> None:
    words = ["--settle-minutes", "0", "--dataset", storage.join(base, "incoming")]
    assert walk_of(base, tmp_path).fire(*words) == []


@pytest.mark.slow
def test_planning_finds_the_old_folders(base: str, tmp_path: Path) -> None:
    """Asked for by name, the dataset is processed again: all but what CHANGELOG names is there."""
    walk = walk_of(base, tmp_path)
    walk.discover("--dataset", storage.join(base, "incoming/first"))
    old = old_runs(base)
    walk.plan("plan")
    assert walk.slots("extract") == []
    walk.plan("publish")
    plan = jobs.read_plan(jobs.read(walk.job), "publish")
    assert plan.shards == "50c7c45994c5ded4"
    assert len(walk.slots("train")) == bool(TRAINED_ANEW)
    walk.all_of("train")
    urls = [storage.join(base, "saev/runs", name) for name in plan.runs]
    assert sorted(kinds(urls)) == ["batch-top-k", "jump-relu", "relu", "top-k"]
    for kind, run in zip(kinds(urls), urls, strict=True):
        assert (run == old[kind]) == (kind not in TRAINED_ANEW)
    anew = set(plan.runs) - {storage.name(u) for u in old.values()}
    assert {run for slot in plan.slots["infer"] for i in slot for run in i["runs"]} == anew


@pytest.mark.slow
def test_saev_run_computes_nothing(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "labelled.json"
    shutil.copy(HERE / "labelled.json", config)
    root = storage.join(base, "saev")
    before = contents(root)
    with caplog.at_level(logging.INFO):
        cli.main(["run", "--config", str(config), "--root", root])
    after = contents(root)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert not [k for k in changed if not may_change(k)]


@pytest.mark.parametrize("kind", ["top-k", "batch-top-k"])
def test_a_stored_config_is_run_again(base: str, kind: str) -> None:
    """Version 0.1.0 wrote a penalty into each of them, though these activations have none."""
    url = old_runs(base)[kind]
    config = TrainConfig.of_run(url)
    assert config.objective.sparsity_coeff == 1e-3
    (item,) = train.plan(config)
    (member,) = item["members"]
    assert (member["run_id"] == storage.name(url)) == (kind not in TRAINED_ANEW)
    with pytest.raises(ConfigError, match="has no sparsity penalty"):
        train.plan(config, explicit=["objective.sparsity_coeff"])
    with pytest.raises(ConfigError, match="has no sparsity penalty"):
        train.plan(
            config,
            table={"sae.top_k": 4, "sae.activation.kind": kind, "objective.sparsity_coeff": 2e-3},
        )


def may_change(key: str) -> bool:
    """Pages are drawn anew, since version 0.1.0 did not compare the images' names and labels.

    Shards and results get a record of what they are the answer to.
    """
    return "/report/" in key or "/asked/" in key or key == "index.html"


def test_old_folders_are_read(base: str) -> None:
    with Shards.open(storage.join(base, "saev/shards/2ea428cd2d2cfec5")) as shards:
        shards.verify()
        assert shards.labels().shape == (8, 16)
        assert shards.stats(5) is not None
        assert len(shards.examples()) == 8
    run = storage.join(base, "saev/runs", LABELLED)
    results = Results.find(run, "2ea428cd2d2cfec5")
    assert results.codes().shape == (128, 96)
    assert results.concepts
    assert results.top(int(results.counts.argmax())).example_idx.size == 4
    for url in [run, *old_runs(base).values()]:
        assert saev.load_sae(url).d_sae == 96


@pytest.mark.slow
def test_training_in_flight_is_finished_under_its_old_name(base: str, tmp_path: Path) -> None:
    sweep = tmp_path / "flight.toml"
    shutil.copy(HERE / "flight.toml", sweep)
    words = json.loads((HERE / "flight.json").read_text())
    words[words.index("flight.toml")] = str(sweep)
    flight = storage.join(base, "saev/flight")
    before = {e.name for e in storage.list_dir(flight)} - {"resume"}
    cli.main(words)
    runs = [e.name for e in storage.list_dir(flight) if storage.exists(f"{e.url}/run.json")]
    assert set(runs) == before == {"44c36d498c7b", "bac6dd4b6bbe"}
    rows = storage.read_text(f"{flight}/44c36d498c7b/metrics.jsonl").splitlines()
    assert [json.loads(row)["step"] for row in rows[:4]] == [25, 50, 75, 100]
