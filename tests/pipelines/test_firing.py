"""What a firing of a schedule starts, retries and leaves alone, on a KFP and a storage."""

import json
import logging
import typing as tp
from collections.abc import Iterator
from pathlib import Path

import kfp_server
import pytest
from kfp_server import KfpServer

from saev import storage
from saev.config.steps import DiscoverStep, FireStep
from saev.errors import ClusterError, ConfigError
from saev.launch import outcomes
from saev.launch.runs import Kubeflow, Target
from saev.steps import claims, discover, fire, last_word, step
from saev.steps.last_word import LastWord

CONFIG = {"train": {"n_train": 1000}}
PARAMETERS = ("root", "config", "dataset", "claim", "claim_hours", "n_parts")


class Schedule:
    """A prefix, a storage root, and firings that a KFP knows as runs."""

    def __init__(self, kfp: KfpServer, folder: Path):
        self.kfp = kfp
        self.incoming, self.root = str(folder / "incoming"), str(folder / "saev")
        self.version = self.upload()
        kfp.experiments.append({"experiment_id": "e", "display_name": "saev"})
        kfp.pipelines.append({"pipeline_id": "p", "display_name": "saev"})

    def upload(self) -> str:
        """Another version of the pipeline. Returns its id."""
        root = {"inputDefinitions": {"parameters": {name: {} for name in PARAMETERS}}}
        spec = {"pipeline_spec": {"root": root}, "platform_spec": {}}
        version = f"version-{len(self.kfp.versions)}"
        self.kfp.versions.append({"pipeline_version_id": version, "pipeline_spec": spec})
        return version

    def put(self, key: str, data: bytes = b"x") -> None:
        """Write a file below the prefix."""
        storage.write_bytes(storage.join(self.incoming, key), data)

    def step(self, **more: tp.Any) -> FireStep:
        """A firing's config, in the name of a new run."""
        firing = self.kfp.add_run("saev-incoming-1", "RUNNING", runtime_config={"parameters": {}})
        start = {
            "endpoint": self.kfp.url, "experiment_id": "e", "pipeline_id": "p",
            "version_id": self.version, "service_account": "saev-steps",
            "arguments": {"n_parts": 2},
        }  # fmt: skip
        values = {
            "root": self.root, "config": json.dumps(CONFIG), "owner": firing["run_id"],
            "dataset": self.incoming, "settle_minutes": 0.0, "start": json.dumps(start),
        }  # fmt: skip
        return FireStep(**{**values, **more})

    def fire(self, **more: tp.Any) -> list[dict[str, tp.Any]]:
        """A whole firing. Returns the runs that it has started."""
        before = len(self.kfp.runs)
        cfg = self.step(**more)
        step.do(cfg)
        self.kfp.end(cfg.owner, "SUCCEEDED")
        return self.kfp.runs[before + 1 :]

    def children(self) -> list[dict[str, tp.Any]]:
        """Every run that a firing has started."""
        return [run for run in self.kfp.runs if run["display_name"].startswith("saev ")]

    def discover(self, child: dict[str, tp.Any]) -> str:
        """The first step of a run. Returns the URL of its job."""
        values = child["runtime_config"]["parameters"]
        place = storage.join(self.root, "job-of", child["run_id"])
        step.do(
            DiscoverStep(
                root=values["root"],
                config=json.dumps(values["config"]),
                owner=child["run_id"],
                dataset=values["dataset"],
                claim=json.dumps(values["claim"]),
                claim_hours=values["claim_hours"],
                to_job=place,
            )
        )
        child["state"] = "RUNNING"
        return storage.read_text(place)

    def finish(self, child: dict[str, tp.Any]) -> None:
        """All further steps of a run."""
        raw = child["runtime_config"]["parameters"]["claim"]
        dataset = discover.Dataset.from_dict(raw)
        discover.mark_processed(self.root, dataset, child["run_id"], {})
        discover.end(self.root, child["run_id"], {})
        self.kfp.end(child["run_id"], "SUCCEEDED")

    def fail(self, child: dict[str, tp.Any], kind: tp.Any = "", *, handler: bool = True) -> None:
        """A step of a run fails, for a reason that it tells or, its pod lost, does not."""
        if kind:
            word = LastWord(kind, "a/1.png is no image")
            last_word.keep(word, self.root, child["run_id"], "extract", ["--slot", "0"])
        if handler:
            discover.end(self.root, child["run_id"], {})
        self.kfp.end(child["run_id"], "FAILED")


@pytest.fixture
def schedule(tmp_path: Path) -> Iterator[Schedule]:
    with kfp_server.running() as kfp:
        yield Schedule(kfp, tmp_path)
        assert kfp.violations == []


def test_each_dataset_has_a_run_of_its_own(schedule: Schedule) -> None:
    schedule.put("flowers/1.png")
    schedule.put("pets/1.png")
    made = schedule.fire()
    assert [r["display_name"].split()[:2] for r in made] == [["saev", "flowers"], ["saev", "pets"]]
    for child in made:
        assert "recurring_run_id" not in child, "the schedule would own it, and delete it"
        assert child["service_account"] == "saev-steps"
        assert child["pipeline_version_reference"]["pipeline_version_id"] == schedule.version
        assert child["runtime_config"]["parameters"]["n_parts"] == 2
    assert schedule.fire() == [], "they go on"
    for child in made:
        schedule.discover(child)
    assert schedule.fire() == []
    for child in made:
        schedule.finish(child)
    assert schedule.fire() == []
    schedule.put("pets/2.png")
    (grown,) = schedule.fire()
    assert grown["display_name"].split()[1] == "pets"
    assert grown["display_name"] not in {child["display_name"] for child in made}


def test_a_firing_with_nothing_to_do_starts_nothing(schedule: Schedule) -> None:
    assert schedule.fire() == []


def test_most_unfinished_runs_of_all_firings(schedule: Schedule) -> None:
    for name in "abc":
        schedule.put(f"{name}/1.png")
    first, second = schedule.fire(max_datasets=2)
    assert schedule.fire(max_datasets=2) == []
    schedule.discover(first)
    schedule.finish(first)
    (third,) = schedule.fire(max_datasets=2)
    assert third["display_name"].split()[1] == "c"
    assert second["state"] == "PENDING"
    other = schedule.kfp.add_run("of-somebody-else", "RUNNING")
    assert other in schedule.kfp.runs, "it does not count"
    schedule.discover(second)
    schedule.finish(second)
    schedule.put("d/1.png")
    assert len(schedule.fire(max_datasets=2)) == 1


@pytest.mark.parametrize("how", ["killed", "its pod is retried"])
def test_a_firing_that_ends_between_claim_and_start(schedule: Schedule, how: str) -> None:
    """The dataset is neither forgotten nor started twice."""
    schedule.put("a/1.png")
    schedule.kfp.drop("/runs$", times=1)  # the first request of a firing that is no GET
    schedule.kfp.faults[0] = schedule.kfp.faults[0]._replace(method="POST")
    cfg = schedule.step()
    with pytest.raises(ClusterError):
        step.do(cfg)
    assert schedule.children() == []
    if how == "killed":
        assert schedule.fire() == [], "while that firing runs, it may still start it"
        schedule.kfp.end(cfg.owner, "FAILED")
        (child,) = schedule.fire()
    else:
        step.do(cfg)
        (child,) = schedule.children()
    schedule.discover(child)
    assert schedule.fire() == []


@pytest.mark.parametrize("again", ["the same firing", "the next firing"])
def test_a_lost_answer_starts_nothing_twice(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    schedule.put("a/1.png")
    start = Kubeflow.start

    def lose(self: Kubeflow, *args: tp.Any) -> str:
        start(self, *args)
        raise ClusterError("no answer")

    cfg = schedule.step()
    with monkeypatch.context() as patch:
        patch.setattr(Kubeflow, "start", lose)
        with pytest.raises(ClusterError, match="no answer"):
            step.do(cfg)
    if again == "the same firing":
        step.do(cfg)
    else:
        schedule.kfp.end(cfg.owner, "FAILED")
        schedule.fire()
    (child,) = schedule.children()
    schedule.discover(child)


def test_a_run_that_comes_too_late_does_not_process_the_dataset(schedule: Schedule) -> None:
    """KFP may make a run long after the request, when another firing has started one."""
    schedule.put("a/1.png")
    (late,) = schedule.fire()
    schedule.kfp.runs.remove(late)
    (child,) = schedule.fire()
    schedule.kfp.runs.append(late)
    schedule.discover(child)
    with pytest.raises(ConfigError, match=rf"is being processed by run {child['run_id']}"):
        schedule.discover(late)
    schedule.discover(child)


def test_two_runs_of_one_claim_do_not_both_have_it(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    twin = {**child, "run_id": "twin"}
    schedule.discover(child)
    with pytest.raises(ConfigError, match="This run has nothing to do"):
        schedule.discover(twin)


def test_a_claim_fits_its_dataset_and_config(schedule: Schedule) -> None:
    """As when somebody clones a run in the UI and edits its parameters."""
    schedule.put("a/1.png")
    schedule.put("b/1.png")
    (child, _) = schedule.fire()
    for name, value in (
        ("config", {"train": {"n_train": 2}}),
        ("dataset", f"{schedule.incoming}/b"),
    ):
        parameters = {**child["runtime_config"]["parameters"], name: value}
        with pytest.raises(ConfigError, match="Leave it out"):
            schedule.discover({**child, "runtime_config": {"parameters": parameters}})


def test_a_dataset_that_changes_before_its_turn(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.put("a/2.png")
    with pytest.raises(ConfigError, match="has changed since it was discovered"):
        schedule.discover(child)
    schedule.fail(child)
    (grown,) = schedule.fire()
    schedule.discover(grown)


@pytest.mark.parametrize("kind", ["", "passing"])
@pytest.mark.parametrize("handler", [True, False])
def test_a_run_that_may_succeed_is_retried_a_few_times(
    schedule: Schedule, kind: str, handler: bool, caplog: pytest.LogCaptureFixture
) -> None:
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.discover(child)
    for i in range(2):
        schedule.fail(child, kind, handler=handler)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert schedule.fire() == []
        assert child["state"] == "RUNNING", "the same run goes on"
        assert f"retrying run {child['display_name']}" in caplog.text
        assert f"{i + 1} of 2 times: " in caplog.text
        assert ("no step recorded a reason" in caplog.text) == (not kind)
        folder = storage.parent(storage.list_dir(_claims(schedule))[0].url)
        with claims.held(folder, child["run_id"]):
            assert schedule.fire() == [], "it has its claim again"
    schedule.fail(child, kind, handler=handler)
    schedule.fire()
    assert child["state"] == "FAILED"
    assert schedule.children() == [child]


def _claims(schedule: Schedule) -> str:
    (dataset,) = discover.candidates(
        schedule.root, schedule.incoming, schedule.step().file, marker="", settle_minutes=0.0
    )
    return discover.claims_of(schedule.root, dataset)


def test_a_run_that_failed_before_its_first_step_is_retried(schedule: Schedule) -> None:
    """As when its image cannot be pulled: the claim is still the firing's."""
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.kfp.end(child["run_id"], "FAILED")
    assert schedule.fire() == []
    assert child["state"] == "RUNNING"
    schedule.discover(child)
    schedule.finish(child)


def test_a_permanent_failure_is_not_tried_again(
    schedule: Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.discover(child)
    schedule.fail(child, "permanent")
    assert schedule.fire() == []
    assert child["state"] == "FAILED"
    assert "failed permanently in step extract" in caplog.text
    assert "a/1.png is no image" in caplog.text
    schedule.version = schedule.upload()
    (new,) = schedule.fire()
    assert new["pipeline_version_reference"]["pipeline_version_id"] == schedule.version
    schedule.discover(new)
    schedule.fail(new, "permanent")
    assert schedule.fire() == []
    schedule.put("a/1.png", b"mended")
    assert len(schedule.fire()) == 1


def test_what_was_said_before_a_retry_is_not_said_after_it(schedule: Schedule) -> None:
    """An exit handler that has succeeded runs no second time, so the record stays as it was."""
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.discover(child)
    schedule.fail(child, "permanent")
    record = storage.read_sealed(outcomes.record_of(schedule.root, child["run_id"])).record
    storage.write_json(
        outcomes.record_of(schedule.root, child["run_id"]),
        storage.seal({**record, "finished": "2020-01-01T00:00:00+00:00"}),
    )
    kfp = Kubeflow(Target(schedule.kfp.url, "e", "p", schedule.version, "saev-steps"))
    kfp.retry(child["run_id"])  # a person, in the UI, after mending something
    schedule.fail(child, handler=False)
    assert schedule.fire() == []
    assert child["state"] == "RUNNING", "the pod was lost this time"


def test_a_canceled_run_is_left_alone(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.discover(child)
    discover.end(schedule.root, child["run_id"], {})
    schedule.kfp.end(child["run_id"], "CANCELING", "FAILED")
    assert schedule.fire() == []
    assert child["state"] == "FAILED"


def test_a_failed_run_that_is_deleted_makes_room_for_another(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    (child,) = schedule.fire()
    schedule.discover(child)
    schedule.fail(child, "permanent")
    schedule.kfp.runs.remove(child)
    assert len(schedule.fire()) == 1


def test_a_run_that_a_person_started(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    theirs = schedule.kfp.add_run("a-now", "RUNNING")
    cfg = schedule.step()
    url = storage.join(schedule.incoming, "a")
    discover.one(schedule.root, url, cfg.file, theirs["run_id"], 1.0)
    assert schedule.fire() == [], "it goes on"
    schedule.kfp.end(theirs["run_id"], "FAILED")  # no exit handler ran: the claim is held
    assert len(schedule.fire()) == 1, "nobody has to wait until the claim expires"


def test_a_run_of_another_installation_is_respected(schedule: Schedule) -> None:
    """Two clusters may share a storage root."""
    schedule.put("a/1.png")
    discover.one(schedule.root, f"{schedule.incoming}/a", schedule.step().file, "elsewhere", 1.0)
    assert schedule.fire() == []
    discover.end(schedule.root, "elsewhere", {})
    assert len(schedule.fire()) == 1


def test_what_kfp_refuses_for_one_dataset_does_not_stop_the_others(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    schedule.put("b/1.png")
    schedule.kfp.fail("/runs$", 503, method="POST", times=1)
    cfg = schedule.step()
    with pytest.raises(ClusterError, match="Cannot start the run saev a") as raised:
        step.do(cfg)
    assert last_word.of(raised.value).kind == "passing", "the supervisor fires again"
    assert [child["display_name"].split()[1] for child in schedule.children()] == ["b"]
    step.do(cfg)
    assert [child["display_name"].split()[1] for child in schedule.children()] == ["b", "a"]


def test_who_may_not_start_runs_is_told_so(schedule: Schedule) -> None:
    schedule.put("a/1.png")
    schedule.kfp.fail("/runs$", 403, "no create on runs", method="POST")
    with pytest.raises(ClusterError, match=r"403: no create on runs.*saev-schedule") as raised:
        step.do(schedule.step())
    assert last_word.of(raised.value).kind == "permanent"


def test_without_a_kfp_nothing_is_started(schedule: Schedule, tmp_path: Path) -> None:
    """As on a laptop, where the client starts what the firing has claimed."""
    schedule.put("a/1.png")
    place = tmp_path / "runs.json"
    cfg = schedule.step(start="{}", to_runs=str(place))
    step.do(cfg)
    (started,) = json.loads(place.read_text())
    assert started["dataset"] == storage.join(schedule.incoming, "a")
    assert started["claim"]["run"] == cfg.owner
    assert schedule.children() == []


def test_many_pages_of_runs(schedule: Schedule) -> None:
    for i in range(230):
        schedule.kfp.add_run(f"other-{i}", "RUNNING")
    kfp = Kubeflow(Target(schedule.kfp.url, "e", "p", schedule.version, "saev-steps"))
    assert len(kfp.unfinished()) == 230
    assert kfp.get("none") is None
    assert len(kfp.named("other-7")) == 1


def test_a_firing_needs_an_owner(schedule: Schedule) -> None:
    with pytest.raises(ConfigError, match="--owner is empty"):
        fire.Firing(schedule.step(owner=""), fire.NoRuns()).run()
