"""Many SAEs in one pass: one read, and for each SAE the bytes that it gives alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from inference.world import LAYER, LAYERS, contents, make_run, make_world
from test_stages import dies
from test_two_workers import in_the_middle

from saev import cli, driver, inference, limits, storage
from saev.config import (
    BatchTopK,
    DataConfig,
    InferenceCommand,
    InferenceConfig,
    JumpRelu,
    Relu,
    SaeConfig,
    TopK,
    TrainConfig,
)
from saev.config.sae import Activation
from saev.errors import ConfigError, CorruptDataError, SaevError
from saev.grouping import measuring_bytes
from saev.inference import job as job_module
from saev.inference import part as part_module
from saev.inference.stage import Measuring
from saev.nn import SparseAutoencoder
from saev.shards import Shards
from saev.stage import Part
from saev.visuals import overview

SAES = {
    "top-k": (48, TopK(top_k=3), "vanilla"),
    "wide": (200, TopK(top_k=60), "vanilla"),
    "threshold": (80, BatchTopK(top_k=4), "vanilla"),
    "relu": (33, Relu(), "vanilla"),
    "jump-relu": (48, JumpRelu(), "vanilla"),
    "matryoshka": (64, TopK(top_k=4), "matryoshka"),
}
N_EXAMPLES, PER_SHARD, TOKENS, D_MODEL = 30, 7, 10, 16
LAYER_BYTES = N_EXAMPLES * TOKENS * D_MODEL * 4


def make_sae(
    root: Path, shards: str, name: str, d_sae: int, activation: Activation, objective: str
) -> str:
    """A run folder of random weights."""
    cfg = SaeConfig(d_model=D_MODEL, d_sae=d_sae, activation=activation)
    generator = torch.Generator().manual_seed(len(name))
    sae = SparseAutoencoder(cfg).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    if sae.threshold is not None:
        sae.threshold.fill_(0.4)
    run = storage.join(str(root), "runs", name)
    sae.save(storage.join(run, "checkpoint"))
    keys = {
        "train_data": {"shards": shards, "layer": LAYER}, "sae": cfg.to_dict(), "tag": name[:1],
        "objective": {"kind": objective},
    }  # fmt: skip
    config = storage.json_bytes(TrainConfig.from_dict(keys).to_dict())
    storage.write_bytes(storage.join(run, "config.json"), config)
    listed = {"config.json": storage.Listed.of(config)}
    storage.write_json(storage.join(run, "run.json"), storage.seal({}, listed))
    return run


@dataclasses.dataclass
class Place:
    """A root with runs that nobody has measured, and what each of them gives alone."""

    root: Path
    shards: str
    alone: dict[str, dict[str, bytes]]

    def fresh(self, folder: Path) -> list[InferenceConfig]:
        """Configs of all runs, copied to another folder, where none is measured."""
        shutil.copytree(self.root / "runs", folder / "runs")
        return [self.config(folder, name) for name in SAES]

    def config(self, folder: Path, name: str) -> InferenceConfig:
        data = DataConfig(shards=self.shards, layer=LAYER)
        return InferenceConfig(run=str(folder / "runs" / name), data=data, n_dists=5, n_top=3)

    def found(self, folder: Path) -> dict[str, dict[str, bytes]]:
        """What was measured of each run."""
        return {name: results(folder, name) for name in SAES}


def results(folder: Path, name: str) -> dict[str, bytes]:
    """All objects that inference left in a run; config.json names the run's place."""
    found = contents(str(folder / "runs" / name / "inference"))
    place = json.dumps(str(folder))[1:-1].encode()
    listed = {n: d for n, d in found.items() if not n.endswith("metrics.json")}
    metrics = {n: json.loads(d) for n, d in found.items() if n.endswith("metrics.json")}
    for record in metrics.values():
        del record["checksum"], record["files"]["config.json"]
    for n in listed:
        if n.endswith("config.json"):
            config = json.loads(listed[n].replace(place, b"PLACE"))
            del config["checksum"]
            listed[n] = json.dumps(config).encode()
    return {**listed, **{n: json.dumps(r).encode() for n, r in metrics.items()}}


@pytest.fixture(autouse=True)
def several_steps_and_pieces(monkeypatch) -> None:
    """Steps of different SAEs begin at different examples, and all have several pieces."""
    monkeypatch.setattr(job_module, "_MAX_LATENT_VALUES", 3000)
    monkeypatch.setattr(part_module, "_PIECE_ENTRIES", 90)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("place")
    shards = make_world(root, n_examples=N_EXAMPLES, per_shard=PER_SHARD).shards
    shutil.rmtree(root / "runs")
    for name, of in SAES.items():
        make_sae(root, shards, name, *of)
    made = Place(root, shards, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "_MAX_LATENT_VALUES", 3000)
        patch.setattr(part_module, "_PIECE_ENTRIES", 90)
        folder = root / "alone"
        for cfg in made.fresh(folder):
            inference.run(cfg)
    made.alone = made.found(folder)
    return made


@pytest.fixture
def read_bytes(monkeypatch) -> list[tuple[str, int]]:
    """Objects of activations that are read from storage, and how many bytes each time; without the
    single vectors that are read for embeddings of images."""
    found: list[tuple[str, int]] = []
    readinto = storage.RangeReader.readinto

    def counted(self: storage.RangeReader, offset: int, buffer: memoryview) -> None:
        name = storage.name(self.url)
        if name.startswith("acts") and memoryview(buffer).nbytes > 4 * D_MODEL:
            found.append((name, memoryview(buffer).nbytes))
        readinto(self, offset, buffer)

    monkeypatch.setattr(storage.RangeReader, "readinto", counted)
    return found


def test_steps_of_the_saes_differ(place) -> None:
    """Otherwise the tests below would show little."""
    job = Measuring([place.config(place.root, name) for name in SAES])
    sizes = [one.examples_per_step for one in job._members]
    assert len(set(sizes)) >= 4
    assert any(max(sizes) % size for size in sizes)
    job.close()


def test_bytes_are_those_of_an_sae_alone(place, tmp_path) -> None:
    cfgs = place.fresh(tmp_path)
    urls = inference.run_all(cfgs)
    assert [storage.parent(storage.parent(url)) for url in urls] == [cfg.run for cfg in cfgs]
    assert place.found(tmp_path) == place.alone


def test_one_read_serves_all(place, tmp_path, read_bytes) -> None:
    cfgs = place.fresh(tmp_path)
    inference.run_all([cfg.model_copy(update={"n_dists": 0}) for cfg in cfgs])
    assert sum(n for _, n in read_bytes) == LAYER_BYTES
    read_bytes.clear()
    inference.run_all(cfgs)  # which looks at a sample first: here, at everything
    assert sum(n for _, n in read_bytes) == 2 * LAYER_BYTES


def test_nothing_is_read_for_what_is_published(place, tmp_path, read_bytes) -> None:
    cfgs = place.fresh(tmp_path)
    inference.run(cfgs[1])
    before = contents(cfgs[1].run)
    times = {p: p.stat().st_mtime_ns for p in Path(cfgs[1].run).rglob("*") if p.is_file()}
    read_bytes.clear()
    inference.run_all(cfgs)
    assert sum(n for _, n in read_bytes) == 2 * LAYER_BYTES
    assert contents(cfgs[1].run) == before
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    assert place.found(tmp_path) == place.alone
    read_bytes.clear()
    inference.run_all(cfgs)
    assert not read_bytes


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts(place, tmp_path, order) -> None:
    cfgs = place.fresh(tmp_path)
    for number in order:
        driver.run_job(Measuring(cfgs), f"{number}/3")
    assert not list(tmp_path.rglob("metrics.json"))
    inference.run_all(cfgs)
    assert place.found(tmp_path) == place.alone


def test_parts_of_one_sae_and_of_the_group_fit_together(place, tmp_path, read_bytes) -> None:
    cfgs = place.fresh(tmp_path)
    driver.run_job(Measuring(cfgs[0]), "1/2")
    driver.run_job(Measuring(cfgs), "2/2")
    inference.run(cfgs[0])
    inference.run_all(cfgs)
    assert place.found(tmp_path) == place.alone


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 8, 40, 90])
def test_killed_and_run_again(place, tmp_path, at) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        cfgs = place.fresh(tmp_path)
        assert dies(lambda: inference.run_all(cfgs), at)
        inference.run_all(cfgs)
    finally:
        torch.set_num_threads(n_threads)
    assert place.found(tmp_path) == place.alone


@pytest.mark.parametrize("at", [4])
def test_two_workers(place, tmp_path, at) -> None:
    cfgs = place.fresh(tmp_path)
    said: list[object] = []
    twin = in_the_middle(lambda: said.append(inference.run_all(cfgs)), at)
    inference.run_all(cfgs, twin)
    assert said
    assert place.found(tmp_path) == place.alone


def test_saes_of_other_tokens_are_other_groups(place, tmp_path, read_bytes) -> None:
    cfgs = place.fresh(tmp_path)
    other = DataConfig(shards=place.shards, layer=LAYERS[0])
    cfgs[2] = cfgs[2].model_copy(update={"data": other, "n_dists": 0})
    cfgs = [cfg.model_copy(update={"n_dists": 0}) for cfg in cfgs]
    items = Measuring(cfgs).items()
    assert [item.spec for item in items[:5]] == [{"shard": i, "group": 0} for i in range(5)]
    assert [item.spec["group"] for item in items[5:]] == [1] * 5
    assert len({item.name for item in items}) == 10
    urls = inference.run_all(cfgs)
    # The other group reads the last layer, too, for the embeddings of images.
    assert sum(n for _, n in read_bytes) == 3 * LAYER_BYTES
    layers = [storage.read_json(storage.join(url, "metrics.json"))["layer"] for url in urls]
    assert layers == [LAYER, LAYER, LAYERS[0], LAYER, LAYER, LAYER]


def test_more_weights_than_memory_are_several_groups(place, tmp_path, monkeypatch) -> None:
    cfgs = place.fresh(tmp_path)
    # Two of the larger ones have room together.
    monkeypatch.setattr(limits, "PIECE_ENTRIES", 0)
    monkeypatch.setattr(limits, "GROUP_BYTES", measuring_bytes(D_MODEL, 260, TOKENS, n_top=3))
    job = Measuring(cfgs)
    assert [[Path(one.run).name for one in group] for group in job._groups] == [
        ["top-k", "wide"], ["threshold", "relu", "jump-relu", "matryoshka"],
    ]  # fmt: skip
    driver.run_job(job)
    assert place.found(tmp_path) == place.alone


def test_the_same_sae_twice_is_measured_once(place, tmp_path) -> None:
    cfg = place.fresh(tmp_path)[0]
    first, second = inference.run_all([cfg, cfg])
    assert first == second
    assert results(tmp_path, "top-k") == place.alone["top-k"]
    assert inference.run_all([]) == []


def test_an_sae_that_is_not_sound_is_named(place, tmp_path) -> None:
    cfgs = place.fresh(tmp_path)
    broken = cfgs[3].run
    sae = SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=33, activation=Relu()))
    sae.b_dec.data.fill_(float("nan"))
    sae.save(storage.join(broken, "checkpoint"))
    with pytest.raises(CorruptDataError, match=rf"the SAE at {broken} is nan") as raised:
        inference.run_all(cfgs)
    assert "SAEs failed" not in str(raised.value)  # the error is the one that it has alone
    assert not list(Path(broken).rglob("parts/*"))
    found = place.found(tmp_path)
    assert {n: d for n, d in found.items() if n != "relu"} == {
        n: d for n, d in place.alone.items() if n != "relu"
    }


def test_saes_fail_alone(place, tmp_path, read_bytes) -> None:
    """All that can be wrong with one SAE; and a second try reads nothing for the others."""
    cfgs = place.fresh(tmp_path)
    runs = {name: Path(cfg.run) for name, cfg in zip(SAES, cfgs, strict=True)}
    other = make_run(tmp_path / "other", place.shards, d_model=24, d_sae=32, top_k=2)
    cfgs.append(cfgs[0].model_copy(update={"run": other}))
    (runs["wide"] / "checkpoint" / "sae.safetensors").unlink()
    (runs["threshold"] / "config.json").write_text("{")
    (runs["jump-relu"] / "inference").write_text("a file, where a folder is expected")
    weights = runs["matryoshka"] / "checkpoint" / "sae.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SaevError) as raised:
        inference.run_all(cfgs)
    said = str(raised.value)
    assert said.startswith("5 of 7 SAEs failed. ")
    for part in ("width 24", *(str(runs[n]) for n in SAES if n not in ("top-k", "relu"))):
        assert part in said
    found = place.found(tmp_path)
    for name in ("top-k", "relu"):
        assert found[name] == place.alone[name]
    read_bytes.clear()
    with pytest.raises(SaevError, match="5 of 7 SAEs failed"):
        inference.run_all(cfgs)
    assert not read_bytes
    for name, run in runs.items():
        if name not in ("top-k", "relu"):
            shutil.rmtree(run)
            shutil.copytree(place.root / "runs" / name, run)
    inference.run_all(cfgs[:-1])
    assert place.found(tmp_path) == place.alone


def test_the_page_shows_those_that_have_not_failed(place, tmp_path, capsys) -> None:
    place.fresh(tmp_path)
    (tmp_path / "shards").symlink_to(place.root / "shards")
    (tmp_path / "runs" / "wide" / "checkpoint" / "sae.safetensors").unlink()
    words = ["--run", *(str(tmp_path / "runs" / name) for name in ("wide", "relu", "top-k"))]
    with pytest.raises(SystemExit) as ended:
        cli.main(["inference", *words, "--n-dists", "0", "--device", "cpu"])
    assert ended.value.code == 1
    assert "saev: error: " in capsys.readouterr().err
    (section,) = overview.collect(str(tmp_path))
    measured = {storage.name(row.run) for row in section.rows if row.metrics}
    assert measured == {"relu", "top-k"}
    assert "of all images" in (tmp_path / "index.html").read_text()


def test_parts_of_saes_that_fail_alone(place, tmp_path) -> None:
    """The part that comes last publishes the others: nobody may come after it."""
    cfgs = place.fresh(tmp_path)
    sae = SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=33, activation=Relu()))
    sae.b_dec.data.fill_(float("nan"))
    sae.save(storage.join(cfgs[3].run, "checkpoint"))
    for number in (2, 1):
        assert not list(tmp_path.rglob("metrics.json"))
        job = Measuring(cfgs)
        driver.do_items(job, Part(number, 2).slice(job.items()))
        with pytest.raises(CorruptDataError, match="is nan"):
            driver.end_part(job)
        job.close()
    found = {p.parts[-4] for p in tmp_path.rglob("metrics.json")}
    assert found == SAES.keys() - {"relu"}


# --- Which SAEs ----------------------------------------------------------------------------


def test_named_and_found_saes(place) -> None:
    folder = place.root / "runs"
    runs = {name: str(folder / name) for name in SAES}
    (folder / "unfinished").mkdir()

    def chosen(**keys: object) -> list[str]:
        return [cfg.run for cfg in InferenceCommand.from_dict(keys).configs()]

    assert chosen(run=[runs["relu"]]) == [runs["relu"]]
    assert chosen(run=["hf-hub:a/b"], out="/o") == ["hf-hub:a/b"]
    assert chosen(runs=str(folder)) == sorted(runs.values())
    assert chosen(run=[runs["wide"], f"{folder}/./wide/"], runs=str(folder), tag="t") == [
        runs["wide"], runs["threshold"], runs["top-k"],
    ]  # fmt: skip
    for keys, message in [
        ({}, "Name an SAE: --run URL"),
        ({"tag": "t"}, "--runs URL, which is missing"),
        ({"runs": str(place.root)}, "no complete run folders"),
        ({"runs": str(folder), "tag": "x"}, "has the tag 'x'; tags there: 'j', 'm', 'r', 't', 'w'"),
        ({"runs": str(folder), "out": "/o"}, "--out is one folder, but there are 6 SAEs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            chosen(**keys)


@pytest.mark.parametrize(
    "words",
    [
        ["--run", "a", "b", "--n-top", "2"],
        ["--run", "a", "--n-top", "2", "--run", "b"],
        ["--run=a", "--run=b", "--n-top=2"],
    ],
)
def test_several_runs_on_a_command_line(words) -> None:
    cfg = cli.parse(["inference", *words])
    assert isinstance(cfg, InferenceCommand)
    assert (cfg.run, cfg.n_top) == (("a", "b"), 2)


def test_the_command_measures_all(place, tmp_path, capsys) -> None:
    place.fresh(tmp_path)
    flags = f"--n-dists 5 --n-top 3 --data.layer {LAYER} --device cpu"
    where = ["--runs", str(tmp_path / "runs"), "--data.shards", place.shards]
    cli.main(["inference", *where, *flags.split()])
    said = capsys.readouterr()
    assert "Measured 6 SAEs" in said.err
    assert "saev visuals --run" in said.err  # of the best one
    urls = said.out.split()
    assert [Path(url).parents[1].name for url in urls] == sorted(SAES)
    assert place.found(tmp_path).keys() == place.alone.keys()
    for name, alone in place.alone.items():
        same = {n: d for n, d in alone.items() if not n.endswith("config.json")}
        assert {n: results(tmp_path, name)[n] for n in same} == same


def test_shards_are_opened_once(place, tmp_path, monkeypatch) -> None:
    opened = []
    open_ = Shards.open
    monkeypatch.setattr(Shards, "open", lambda url: opened.append(url) or open_(url))
    inference.run_all(place.fresh(tmp_path))
    assert opened == [place.shards]
