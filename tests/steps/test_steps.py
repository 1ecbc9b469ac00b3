"""What steps tell KFP, and what they say to a mistake."""

import json
import math
from pathlib import Path

import pytest
from described import files_below
from walk import Walk

from saev import cli, storage
from saev.config import TrainConfig
from saev.errors import CheckpointError, ConfigError, CorruptDataError, StorageError
from saev.inference import stage as inference_stage
from saev.progress import Progress
from saev.steps import advice, check, discover, jobs, last_word, outputs, step
from saev.steps.jobs import Plan

from .places import Place

FAKE = json.dumps(
    {
        "data": {"kind": "fake-img", "n_examples": 4, "image_size": 64},
        "shards": {"family": "timm", "ckpt": "test_vit/random", "image_size": 64, "layers": [-1]},
    }
)


def fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one error of a step that exits with status 1."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["step", *argv])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.count("saev: error: ") == 1
    assert "Traceback" not in err
    return err.partition("saev: error: ")[2]


def test_check_uses_the_storage_and_leaves_nothing(place: Place) -> None:
    place.put("a/1.png")
    assert check.check_root(place.root, place.incoming) == [place.root, place.incoming]
    assert files_below(place.root) == []


def test_check_says_what_failed_first(tmp_path: Path, s3: str) -> None:
    """Without a secret, nothing was written, so there is nothing to delete."""
    del s3
    with pytest.raises(StorageError, match="Cannot write s3://no-such-bucket-of-saev"):
        check.check_root("s3://no-such-bucket-of-saev/root")


@pytest.mark.parametrize("state", ["FAILED", "COMPLETE"])
def test_the_exit_handler_does_not_hide_the_first_cause(s3: str, state: str) -> None:
    """A bucket that is missing has been said by the step before; what is new is said as ever."""
    del s3
    words = ["--root", "s3://no-such-bucket-of-saev/root", "--owner", "run"]
    cfg = cli.parse(["step", "outcome", *words, "--status", json.dumps({"state": state})])
    with pytest.raises(StorageError) as raised:
        step.do(cfg)
    assert ("`make logs` repeats it" in str(raised.value)) == (state == "FAILED")
    assert "s3://no-such-bucket-of-saev/root" in str(raised.value)


def test_metrics_are_metadata_of_an_artifact_beside_all_others(tmp_path: Path) -> None:
    place = tmp_path / "executor_output.json"
    artifacts = {
        "page": {"artifacts": [{"name": "page", "uri": "s3://b/page", "metadata": {}}]},
        "metrics": {"artifacts": [{"name": "metrics", "uri": "s3://b/metrics", "metadata": {}}]},
    }
    executor_input = json.dumps({"outputs": {"outputFile": str(place), "artifacts": artifacts}})
    found = {"l0": 2, "nmse": 0.12345678, "none": math.nan, "n": 1234567, "sae": "top_k 2"}
    outputs.write_metrics(executor_input, found)
    written = json.loads(place.read_text())["artifacts"]
    assert written["metrics"]["artifacts"][0]["metadata"] == {
        "l0": 2.0, "nmse": 0.12346, "n": 1234567.0, "sae": "top_k 2",
    }  # fmt: skip
    assert written["page"] == artifacts["page"]


@pytest.mark.parametrize("text", ["{", "[]", '{"outputs": {}}', '{"outputs": {"outputFile": "x"}}'])
def test_what_is_no_executor_input(text: str) -> None:
    with pytest.raises(ConfigError, match="is not what KFP gives"):
        outputs.write_metrics(text, {"l0": 2.0})


def test_a_labelled_dataset_shows_how_well_latents_match_its_classes(tmp_path: Path) -> None:
    root, to = str(tmp_path / "out"), tmp_path / "output.json"
    file = json.loads(FAKE)
    file["data"] |= {"kind": "fake-img-seg", "n_examples": 12}
    file["train"] = {"n_train": 200, "sae": {"d_sae": 64}}
    file["visuals"] = {"n_latents": 0}
    walk = Walk(root, json.dumps(file), tmp_path / "kfp")
    walk.until("summarise")
    metrics = {"metrics": {"artifacts": [{"name": "metrics", "uri": "x"}]}}
    executor_input = json.dumps({"outputs": {"outputFile": str(to), "artifacts": metrics}})
    walk.all_of("summarise", "--executor-input", executor_input)
    (run,) = (e.name for e in storage.list_dir(f"{root}/runs") if e.name != "resume")
    written = json.loads(to.read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    expected = ("held_out_nmse", "held_out_l0", "held_out_dead", "training_nmse", "training_l0")
    wanted = {*expected, "mean_average_precision", "purity_at_16", "coverage_at_0.3", "probe_r"}
    assert written.keys() >= wanted
    assert (written["run"], written["sae"]) == (run, "topk32-s64")


def test_no_path_no_output() -> None:
    outputs.write_parameter("", "x")
    outputs.write_page("", "x")
    outputs.write_metrics("", {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["discover", "--config", "{"], "--config is '{', which is not JSON"),
        (["discover", "--config", '{"shard": {}}'], "shard: unknown key"),
        (["discover", "--config", "{}"], "No images"),
        (["fire", "--config", "{}", "--dataset", "s3://b/x"], "--owner is empty"),
        (["fire", "--config", "{}", "--dataset", "/x", "--start", "{"], "--start is '{', which is"),
        (["fire", "--config", "{}", "--dataset", "/x", "--start", '{"a": 1}'], "a: unknown key"),
    ],
)
def test_mistakes(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in fails(capsys, *argv, "--root", str(tmp_path / "out"))


def test_a_corrupt_image_names_the_key_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Nobody can give a flag to a step of a pipeline."""
    images = tmp_path / "images" / "cats"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    config = json.loads(FAKE)
    config["data"] = {"kind": "img-folder", "root": str(tmp_path / "images")}
    walk = Walk(str(tmp_path / "out"), json.dumps(config), tmp_path / "kfp")
    walk.until("extract")
    (slot,) = walk.slots("extract")
    capsys.readouterr()
    said = fails(capsys, "extract", "--job", walk.job, "--slot", slot)
    assert "a.png" in said
    assert "with `skip_unreadable = true` under [shards] in the config." in said
    assert "--skip" not in said


@pytest.mark.parametrize(
    ("flag", "tables", "key"),
    [
        ("--data.max-pixels", ("shards",), "`max_pixels` under [data] in the config"),
        ("--image-size", ("shards",), "`image_size` under [shards] in the config"),
        ("--train-data.buffer-mb", ("train",), "`buffer_mb` under [train.train_data] in the"),
        ("--no-save", ("inference", "visuals"), "`save = false` under [inference] in the config"),
        ("--latents", ("inference", "visuals"), "`latents` under [visuals] in the config"),
        ("--part", ("shards",), "--part"),
        ("--item", ("train",), "--item"),
    ],
)
def test_flags_become_keys(flag: str, tables: tuple[str, ...], key: str) -> None:
    err = ConfigError(f"It is wrong. Change {flag}.")
    advice.for_config(err, *tables)
    assert str(err).startswith(f"It is wrong. Change {key}")


def test_steps_write_for_kfp_and_print_for_people(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place.put("a/1.png")
    to, url = tmp_path / "out", storage.join(place.incoming, "a")
    more = ["--config", "{}", "--root", place.root]
    command = f"step fire --owner firing --settle-minutes 0 --to-runs {to}"
    cli.main([*command.split(), *more, "--dataset", place.incoming])
    assert capsys.readouterr().out.split() == [url]
    (started,) = json.loads(to.read_text())
    command = f"step discover --owner run --to-job {to} --dataset"
    cli.main([*command.split(), started["dataset"], *more, "--claim", json.dumps(started["claim"])])
    assert capsys.readouterr().out.split() == [url]
    job = jobs.read(to.read_text())
    assert (job.root, job.owner, job.dataset.name) == (place.root, "run", "a")
    (entry,) = storage.list_dir(storage.join(place.root, "datasets", "configs"))
    assert job.config == entry.url


# --- Jobs ----------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> jobs.Job:
    """The job of a config that names its own images."""
    return jobs.read(Walk(str(tmp_path / "out"), FAKE, tmp_path / "kfp").discover())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--job", "s3://bucket/x.json", "--slot", "0"], "expected the URL of a job,"),
        (["--job", "/jobs/123456789012", "--slot", "0"], "job.json"),
        (["--job", "JOB", "--slot", "part 1"], "--slot is 'part 1'; expected a number from 0 to 0"),
        (["--job", "JOB", "--slot", "1: part 2 of 2"], "1 slots are planned"),
        (["--job", "JOB", "--slot", "-1"], "1 slots are planned"),
        (["--job", "JOB", "--slot", "²"], "1 slots are planned"),
    ],
)
def test_mistakes_in_a_job(
    job: jobs.Job, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    jobs.write_plan(
        job, "plan", Plan("s", [], {"extract": [[{"name": "p", "part": "1/1"}]]}, {"shards": "s"})
    )
    argv = [job.url if word == "JOB" else word for word in words]
    assert message.replace("\\", "") in fails(capsys, "extract", *argv)


def test_other_activations_than_planned_are_refused(
    job: jobs.Job, capsys: pytest.CaptureFixture
) -> None:
    slot = [{"name": f"p{i}", "part": f"{i}/2"} for i in (1, 2)]
    jobs.write_plan(job, "plan", Plan("s", [], {"extract": [slot]}, {"shards": "s"}))
    said = fails(capsys, "extract", "--job", job.url, "--slot", "0")
    assert "was planned: the dataset, the weights or the version of saev changed" in said
    assert not storage.exists(storage.join(job.root, "shards"))  # none of the slot's items is done


def test_a_run_without_its_claim_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    walk = Walk(str(tmp_path / "out"), FAKE, tmp_path / "kfp", owner="first")
    url = walk.discover()
    Walk(str(tmp_path / "out"), FAKE, tmp_path / "kfp", owner="second").discover()
    assert "Run first no longer has the claim" in fails(capsys, "plan", "--job", url)


def test_a_damaged_job_is_named(job: jobs.Job) -> None:
    stored = storage.join(job.url, "job.json")
    text = storage.read_text(stored)
    storage.write_text(stored, text.replace('"url":""', '"url":"/x"').replace('": ""', '": "/x"'))
    with pytest.raises(CorruptDataError, match=r"job\.json"):
        jobs.read(job.url)


@pytest.mark.parametrize("owner", ["../../x", "a/b"])
def test_the_config_of_a_job_is_one_of_its_root(job: jobs.Job, owner: str) -> None:
    record = {"owner": "", "dataset": job.dataset._asdict(), "config": owner}
    storage.write_json(storage.join(job.url, "job.json"), storage.seal(record))
    with pytest.raises(ConfigError, match="expected a name without slashes"):
        jobs.read(job.url)


def test_where_jobs_are(tmp_path: Path) -> None:
    """Short, whatever the dataset's name, since each pod of a run has it as an input."""
    dataset = discover.Dataset("photos" * 20, "s3://x/photos", "f", "k", "", "")
    for root in ("memory://bucket", "memory://bucket/jobs/a/jobs", str(tmp_path)):
        urls = {jobs.make(root, owner, {"n": n}, dataset) for owner in "ab" for n in (1, 1, 2)}
        assert len(urls) == 4
        for url in urls:
            assert len(url) == len(root) + len("/jobs/") + 12
            assert jobs.read(url).root == root
            assert jobs.read(f"{url}/").url == url


# --- Slots ---------------------------------------------------------------------------------------


def test_slots_hold_every_item_once_and_are_few() -> None:
    items = [{"name": str(i)} for i in range(200)]
    for n in (1, 3, 8, 200, 500):
        slots = jobs.cut(items, n)
        assert len(slots) == min(n, 200)
        assert sorted(int(i["name"]) for slot in slots for i in slot) == list(range(200))
        sizes = [len(slot) for slot in slots]
        assert max(sizes) - min(sizes) <= 1
        assert jobs.cut(items, n) == slots
    assert jobs.cut([], 8) == []


def test_unequal_costs_are_divided_well() -> None:
    """Graham (1969): longest first is at most 4/3 - 1/(3n) of the best division."""
    costs = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    items = [{"name": str(i), "cost": cost} for i, cost in enumerate(costs)]
    loads = [sum(i["cost"] for i in slot) for slot in jobs.cut(items, 3, costs)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= 12 * (4 / 3 - 1 / 9)  # 36 / 3


@pytest.mark.parametrize(
    ("costs", "n_slots", "most", "expected"),
    [
        ([1] * 200, 8, 64, [1] * 200),  # 25 each
        ([1], 8, 64, [8]),
        ([1, 1], 8, 64, [4, 4]),
        ([1], 8, 3, [3]),  # a pass cannot be cut more finely
        ([1] * 3, 2, 64, [2] * 3),  # 2 and 1 would be uneven
        ([1] * 20, 8, 64, [2] * 20),  # 5 halves each
        ([6, 2], 8, 64, [6, 2]),
        ([6, 2], 4, 64, [3, 1]),
        ([], 8, 64, []),
    ],
)
def test_passes_are_cut_no_more_than_even_slots_need(
    costs: list[float], n_slots: int, most: int, expected: list[int]
) -> None:
    assert jobs.n_pieces(costs, n_slots, [most] * len(costs)) == expected


def test_one_that_fails_for_good_does_not_keep_the_others(tmp_path: Path) -> None:
    done: list[str] = []

    def work(item: jobs.Item) -> list[str]:
        if item["name"] == "bad":
            raise ConfigError("it is bad")
        done.append(item["name"])
        return [item["name"]]

    items = [{"name": name} for name in ("a", "bad", "b")]
    with pytest.raises(ConfigError, match="it is bad"):
        jobs.each(items, work, Progress(quiet=True))
    assert done == ["a", "b"]


def test_what_may_pass_ends_the_slot_at_once() -> None:
    done: list[str] = []

    def work(item: jobs.Item) -> list[str]:
        done.append(item["name"])
        error = StorageError("away")
        error.passing = True
        raise error

    with pytest.raises(StorageError, match="away"):
        jobs.each([{"name": "a"}, {"name": "b"}], work, Progress(quiet=True))
    assert done == ["a"]


def test_pods_are_groups_of_saes_times_ranges_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an SAE without weights keeps nobody else: those beside it are measured and published."""
    monkeypatch.setattr(inference_stage, "ITEM_TOKENS", 1)
    root = tmp_path / "out"
    file = json.loads(FAKE)
    file["data"] |= {"n_examples": 12, "image_size": 32}
    file["shards"] |= {"layers": [-2, -1], "image_size": 32, "max_tokens_per_shard": 20}
    file["train"] = {"n_train": 100, "device": "cpu", "sae": {"d_sae": 32}}
    file["sweep"] = {"sae.activation.top_k": [2, 4], "train_data.layer": [-2, -1]}
    walk = Walk(str(root), json.dumps(file), tmp_path / "kfp")
    walk.until("infer", "--n-parts", "4")
    plan = jobs.read_plan(jobs.read(walk.job), "publish")
    items = [item for slot in plan.slots["infer"] for item in slot]
    assert sorted(len(slot) for slot in plan.slots["infer"]) == [1] * 4
    assert sorted(item["part"] for item in items) == ["1/2", "1/2", "2/2", "2/2"]
    groups = {tuple(item["runs"]) for item in items}
    layers = {run: TrainConfig.of_run(f"{root}/runs/{run}").train_data.layer for run in plan.runs}
    assert sorted(run for group in groups for run in group) == sorted(plan.runs)
    assert all(len({layers[run] for run in group}) == 1 for group in groups)

    broken, beside = next(iter(groups))
    weights = root / "runs" / broken / "checkpoint" / "sae.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    for slot, (item,) in zip(walk.slots("infer"), plan.slots["infer"], strict=True):
        if broken in item["runs"]:
            with pytest.raises(CheckpointError, match=broken) as raised:
                walk.do("infer", "--slot", slot)
            assert last_word.of(raised.value).kind == "permanent"
        else:
            walk.do("infer", "--slot", slot)
    assert {path.parts[-4] for path in root.rglob("metrics.json")} == {beside}
    weights.write_bytes(kept)
    walk.all_of("infer")
    walk.all_of("summarise")
    assert {path.parts[-4] for path in root.rglob("metrics.json")} == set(plan.runs)


def test_a_slot_holds_many_saes(tmp_path: Path) -> None:
    """Of two groups and three SAEs, one pod does all of each step; it shows each SAE by name."""
    root = str(tmp_path / "out")
    file = json.loads(FAKE)
    file["data"]["n_examples"] = 12
    file["train"] = {"n_train": 200, "device": "cpu", "max_parallel": 2, "sae": {"d_sae": 64}}
    file["visuals"] = {"n_latents": 1, "log_freq_range": [-9, 0], "log_value_range": [-9, 9]}
    file["sweep"] = {"sae.activation.top_k": [2, 3, 4]}
    walk = Walk(root, json.dumps(file), tmp_path / "kfp")
    walk.until("summarise", "--n-parts", "1")
    assert [len(walk.slots(name)) for name in ("train", "infer", "summarise")] == [1, 1, 1]
    runs = {e.name for e in storage.list_dir(f"{root}/runs") if e.is_dir and e.name != "resume"}
    assert len(runs) == 3
    to, page = tmp_path / "output.json", tmp_path / "page"
    artifacts = {k: {"artifacts": [{"name": k, "uri": k}]} for k in ("metrics", "page")}
    executor_input = json.dumps({"outputs": {"outputFile": str(to), "artifacts": artifacts}})
    flags = ["--executor-input", executor_input, "--to-page", str(page)]
    walk.all_of("summarise", *flags)
    shown = json.loads(to.read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    for k in (2, 3, 4):
        assert f", L0 {k}.0, " in shown[f"topk{k}-s64"]
    assert {line.rpartition("(run ")[2].rstrip(")") for line in map(str, shown.values())} >= runs
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert all(f"<small>run {run}</small></summary>" in html for run in runs)
    assert html.count("&lt;!doctype html&gt;") == 3

    # All of them beside each other.
    artifacts = {k: {"artifacts": [{"name": k, "uri": k}]} for k in ("metrics", "sae_table")}
    executor_input = json.dumps({"outputs": {"outputFile": str(to), "artifacts": artifacts}})
    flags = ["--executor-input", executor_input, "--to-table", str(tmp_path / "table.md")]
    walk.do("report", *flags)
    shown = json.loads(to.read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    records = {run: storage.read_json(f"{root}/runs/{run}/run.json") for run in runs}
    held_out = {run: record["metrics"]["normalized_mse"] for run, record in records.items()}
    best = min(held_out, key=lambda run: held_out[run])
    assert shown["best_run"] == best
    assert shown["held_out_nmse"] == pytest.approx(held_out[best], rel=1e-4)
    rows = [r for r in (tmp_path / "table.md").read_text().splitlines() if "topk" in r]
    assert [f"{value:.4f}" for value in sorted(held_out.values())] == [
        row.split("|")[3].strip(" \u2002") for row in rows
    ]
    own = {run: record["train_metrics"]["normalized_mse"] for run, record in records.items()}
    assert shown["training_nmse"] == pytest.approx(own[best], rel=1e-4)
    assert "(best)" in rows[0]
    assert best in rows[0]

    # Nothing to do: no slots, so no pods.
    walk.until("train")
    assert [walk.slots(name) for name in ("extract", "train", "infer", "summarise")] == [[]] * 4
