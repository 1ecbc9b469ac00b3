"""What says that something is published is read and compared; that it is there is not enough."""

import json
import shutil
import typing as tp
from collections.abc import Callable
from pathlib import Path

import pytest
from described import other_digit

from saev import driver, inference, run, storage, train, visuals
from saev.config.run import RunConfig
from saev.config.stages import Stages
from saev.errors import CorruptDataError
from saev.inference import provenance
from saev.shards import extract
from saev.visuals import overview

FILE = {
    "data": {"kind": "fake-img", "n_examples": 12, "image_size": 32},
    "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 32, "layers": [-1]},
    "train": {
        "n_train": 100,
        "sae": {"d_sae": 32, "activation": {"kind": "top-k", "top_k": 4}},
        "device": "cpu",
    },
    "visuals": {"log_freq_range": [-9, 0], "log_value_range": [-9, 9], "n_latents": 2},
}


class Root(tp.NamedTuple):
    """A root in which everything is complete."""

    path: Path
    stages: Stages
    shards: str
    run: str
    results: str

    def place(self, name: str) -> Path:
        """The object that a stage published last, or beside it."""
        (found,) = self.path.glob(f"out/{name}")
        return found


def opened(path: Path) -> Root:
    cfg = RunConfig(config=str(path / "run.json"), root=str(path / "out"))
    (shards,), (run_url,), (results,) = (
        [str(p) for p in path.glob(f"out/{pattern}")]
        for pattern in ("shards/*", "runs/*", "runs/*/inference/*")
    )
    return Root(path, run.resolve(cfg), shards, run_url, results)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Root:
    path = tmp_path_factory.mktemp("finished")
    (path / "run.json").write_text(json.dumps(FILE))
    run.run(RunConfig(config=str(path / "run.json"), root=str(path / "out")))
    return opened(path)


@pytest.fixture
def root(finished: Root, tmp_path: Path) -> Root:
    """A copy, to be damaged."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return opened(tmp_path / "copy")


def item_of(root: Root) -> dict[str, tp.Any]:
    (item,) = train.plan(root.stages.training(root.shards))
    return item


ASKING: dict[str, list[Callable[[Root], object]]] = {
    "shards": [
        lambda root: extract.Recording(root.stages.shards).published(),
        lambda root: driver.finish(extract.Recording(root.stages.shards)),
        lambda root: extract.run(root.stages.shards),
    ],
    "run": [
        lambda root: train.finish(root.stages.training(root.shards)),
        lambda root: train.work(root.stages.training(root.shards), item_of(root)),
        lambda root: train.run(root.stages.training(root.shards)),
    ],
    "inference": [
        lambda root: inference.find(root.stages.measuring(root.run, root.shards)),
        lambda root: inference.run(root.stages.measuring(root.run, root.shards)),
        lambda root: inference.finish(root.stages.measuring(root.run, root.shards)),
        lambda root: overview.collect(str(root.path / "out")),
    ],
}


@pytest.mark.parametrize(
    ("stage", "name", "key"),
    [
        ("shards", "shards/*/shards.json", "n_examples"),
        ("shards", "shards/*/shards.json", "checksum"),
        ("shards", "shards/*/files.json", "n_bytes"),
        ("run", "runs/*/run.json", "n_steps"),
        ("run", "runs/*/run.json", "normalized_mse"),
        ("inference", "runs/*/inference/*/metrics.json", "l0"),
        ("inference", "runs/*/inference/*/metrics.json", "n_tokens"),
        ("inference", "runs/*/inference/*/config.json", "n_top"),
    ],
)
def test_a_changed_digit_is_found_by_whoever_asks(
    root: Root, stage: str, name: str, key: str
) -> None:
    place = root.place(name)
    before = {p: p.read_bytes() for p in root.path.rglob("*") if p.is_file() and p != place}
    other_digit(place, key)
    asking = ASKING[stage][: 3 if name.endswith("config.json") else None]
    for ask in asking:
        with pytest.raises(CorruptDataError, match=rf"{place.name} is damaged: .*(Restore|ecord)"):
            ask(root)
    assert before == {p: p.read_bytes() for p in before}


def test_a_run_json_of_another_run(root: Root) -> None:
    place = root.place("runs/*/run.json")
    record = storage.read_sealed(place)
    storage.write_json(place, storage.seal({**record.record, "run_id": "0" * 12}, record.files))
    with pytest.raises(CorruptDataError, match=r"run.json is of run '0{12}', expected "):
        train.finish(root.stages.training(root.shards))


def test_metrics_with_the_config_of_others(root: Root) -> None:
    """Sound objects that do not belong together."""
    place = root.place("runs/*/inference/*/config.json")
    record = storage.read_sealed(place).record
    storage.write_json(place, storage.seal({**record, "d_sae": 33}))
    with pytest.raises(CorruptDataError, match=r"config\.json is damaged"):
        inference.find(root.stages.measuring(root.run, root.shards))


def test_a_report_is_written_again(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost by that, because it is made of records that are checked."""
    showing = root.stages.showing(root.run, root.shards, root.results)
    visuals.run(showing)  # of this copy
    place = root.place("runs/*/inference/*/report/visuals.json")
    sound = place.read_bytes()
    other_digit(place, "image_size")
    (section,) = overview.collect(str(root.path / "out"))
    assert [row.report for row in section.rows] == [""]
    caplog.clear()
    visuals.run(showing)
    assert "visuals.json is damaged" in caplog.text
    assert json.loads(place.read_bytes()) == json.loads(sound)
    (section,) = overview.collect(str(root.path / "out"))
    assert section.rows[0].report.endswith("report/index.html")


def test_a_wrong_source_of_a_checkpoint(root: Root) -> None:
    """It decides whether the SAE fits the activations."""
    other_digit(root.place("runs/*/checkpoint/config.json"), "n_tokens")
    with pytest.raises(CorruptDataError, match=r"checkpoint/config\.json is damaged"):
        provenance.trained_on(root.run)
