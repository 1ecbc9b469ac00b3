"""`schedule`, `schedules`, `unschedule`, and the reading of cron expressions."""

import datetime
import re
import threading

import pytest
from client import Client
from hypothesis import given
from hypothesis import strategies as st
from kfp_server import KfpServer
from kube_server import KubeServer

from pipelines import cron, watch
from saev import storage
from saev.config.steps import Start
from saev.errors import ConfigError

SCHEDULE = (
    "schedule", "--dataset", "s3://bucket/incoming/", "--config", "config.toml", "--no-check",
    "--cron",
)  # fmt: skip
DAILY = "0 0 3 * * *"


def test_a_schedule_is_made(client: Client, kfp: KfpServer) -> None:
    result = client.ok(*SCHEDULE, DAILY, "--marker", "_SUCCESS", "--claim-hours", "12")
    assert result.out == "saev-incoming\n"
    assert len(re.findall(r"20\d\d-\d\d-\d\d 03:00:00", result.err)) == 3
    [made] = kfp.recurring
    assert made["trigger"] == {"cron_schedule": {"cron": DAILY}}
    assert made["max_concurrency"] == "1"
    assert made["no_catchup"] is True
    assert made["mode"] == "ENABLE"
    assert made["service_account"] == "saev-schedule"
    parameters = made["runtime_config"]["parameters"]
    assert parameters["dataset"] == "s3://bucket/incoming"
    assert parameters["marker"] == "_SUCCESS"
    assert parameters["claim_hours"] == 12.0
    assert "settle_minutes" not in parameters
    assert kfp.pipelines[0]["display_name"] == "saev-incoming"


def test_a_schedule_says_what_its_firings_start(client: Client, kfp: KfpServer) -> None:
    """The version, image and parameters of the runs on datasets are those of this moment."""
    client.ok(*SCHEDULE, DAILY, "--param", "n_parts=3", "gpu_count=0", "max_datasets=7")
    parameters = kfp.recurring[0]["runtime_config"]["parameters"]
    start = Start.from_dict(parameters["start"], source="start")
    ids = {p["display_name"]: p["pipeline_id"] for p in kfp.pipelines}
    (version,) = [v for v in kfp.versions if v["pipeline_id"] == ids["saev"]]
    assert (start.pipeline_id, start.version_id) == (ids["saev"], version["pipeline_version_id"])
    assert start.experiment_id == kfp.experiments[0]["experiment_id"]
    assert start.endpoint == "http://ml-pipeline.kubeflow:8888"
    assert start.service_account == "saev-steps"
    assert start.arguments == {"n_parts": 3}, "what pods are like is compiled"
    assert parameters["max_datasets"] == 7
    assert "n_parts" not in parameters
    # What a firing adds is all that is missing.
    given = {**start.arguments, "root": "r", "dataset": "d", "config": {}, "claim_hours": 24.0}
    wanted = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert set(given) <= set(wanted)
    said = client.fails(*SCHEDULE, DAILY, "--param", "n_prts=3")
    assert "no parameter 'n_prts' (--param). Did you mean n_parts?" in said
    assert "claim," not in said, "no user says that"


def test_the_runs_that_a_firing_started_are_shown(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("saev a 1", "RUNNING", runtime_config={"parameters": {"claim": {"run": "x"}}})
    firing = kfp.add_run("nightly-7", runtime_config={"parameters": {"start": {}}})
    of_it = {"parameters": {"dataset": "s3://b/a", "claim": {"run": firing["run_id"]}}}
    child = kfp.add_run("saev b 2", "RUNNING", runtime_config=of_it)
    for i in range(101):
        kfp.add_run(f"other-{i}")
    out = client.ok("status", "nightly-7").out
    assert f"started  saev b 2 ({child['run_id']}): running, " in out
    assert "saev a 1" not in out
    firing["created_at"] = kfp.now()
    assert "It started no runs." in client.ok("status", "nightly-7").out
    assert "discover" not in out, "a firing has one step"


def test_a_schedule_needs_its_service_account(
    client: Client, kfp: KfpServer, kube: KubeServer
) -> None:
    """Version 0.1.0 installed none; firings would fail without a word here."""
    kube.add("namespaces", "kubeflow")
    said = client.fails(*SCHEDULE, DAILY)
    assert "There is no service account saev-schedule in namespace kubeflow" in said
    assert "`make install" in said
    assert kfp.recurring == []
    kube.add("serviceaccounts", "saev-schedule", "kubeflow")
    client.ok(*SCHEDULE, DAILY)
    kube.statuses["serviceaccounts"] = 403
    client.ok(*SCHEDULE, DAILY)


def test_a_schedule_may_come_before_its_data(
    client: Client, kfp: KfpServer, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_ROOT", f"{s3}/early/root")
    argv = ("schedule", "--config", "config.toml", "--cron", DAILY, "--dataset")
    said = client.ok(*argv, f"{s3}/early/incoming").err
    assert f"nothing is below {s3}/early/incoming yet" in said
    storage.write_bytes(f"{s3}/early/incoming/pets/a.png", b"png")
    said = client.ok(*argv, f"{s3}/early/incoming").err
    assert "yet" not in said
    assert f"ok: {s3}/early/incoming is readable" in said


def test_a_schedule_of_the_same_name_is_replaced(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, DAILY)
    client.ok(*SCHEDULE, DAILY, "--name", "other")
    client.ok(*SCHEDULE, "0 30 4 * * *")
    found = {r["display_name"]: r["trigger"]["cron_schedule"]["cron"] for r in kfp.recurring}
    assert found == {"saev-incoming": "0 30 4 * * *", "other": DAILY}
    changes = [method for method, path, _ in kfp.requests if "/recurringruns" in path]
    # Never without a schedule in between; the old one is switched off before it is deleted.
    assert changes[-3:] == ["POST", "POST", "DELETE"]
    assert sum(path.endswith(":disable") for _, path, _ in kfp.requests) == 1


def test_if_the_new_schedule_is_refused_the_old_one_stays(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, DAILY)
    kfp.fail("/recurringruns$", 500, method="POST")
    assert "Cannot make schedule saev-incoming" in client.fails(*SCHEDULE, "0 30 4 * * *")
    assert [r["trigger"]["cron_schedule"]["cron"] for r in kfp.recurring] == [DAILY]


def test_if_the_old_schedule_stays_that_is_told_and_mended(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, DAILY)
    kfp.fail("/recurringruns/", 500, method="DELETE", times=1)
    said = client.fails(*SCHEDULE, "0 30 4 * * *")
    assert "The new schedule saev-incoming is made, but an old one still exists" in said
    assert len(kfp.recurring) == 2
    client.ok(*SCHEDULE, "0 30 4 * * *")
    assert len(kfp.recurring) == 1


def test_schedules_are_listed(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, "0 0 0 29 2 *")
    client.ok(*SCHEDULE, DAILY, "--name", "paused")
    kfp.recurring[1]["status"] = "DISABLED"
    kfp.recurring.append(
        {
            "recurring_run_id": "x",
            "display_name": "by-others",
            "status": "ENABLED",
            "created_at": kfp.now(),
            "trigger": {"periodic_schedule": {"interval_second": "7200"}},
        }
    )
    lines = client.ok("schedules").out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert "0 0 0 29 2 *" in rows["saev-incoming"]
    assert "-02-29 00:00" in rows["saev-incoming"]
    assert "s3://bucket/incoming" in rows["saev-incoming"]
    assert " off " in rows["paused"]
    assert "every 2.0 h" in rows["by-others"]


def test_unschedule(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, DAILY)
    said = client.fails("unschedule", "saev-incomming")
    assert "There is no schedule 'saev-incomming'. Did you mean saev-incoming?" in said
    assert len(kfp.recurring) == 1
    assert "is deleted" in client.ok("unschedule", "saev-incoming").err
    assert kfp.recurring == []


def _busy(kfp: KfpServer) -> dict:
    """A run of the only schedule that goes on, beside some that do not count."""
    schedule = kfp.recurring[0]["recurring_run_id"]
    kfp.add_run("over", recurring_run_id=schedule)
    kfp.add_run("of-another", "RUNNING", recurring_run_id="another")
    return kfp.add_run("nightly-7", "RUNNING", recurring_run_id=schedule)


def test_unschedule_does_not_kill_runs(client: Client, kfp: KfpServer) -> None:
    """KFP deletes the Workflows of a schedule with it, and calls their runs running for ever."""
    client.ok(*SCHEDULE, DAILY)
    run = _busy(kfp)
    said = client.fails("unschedule", "saev-incoming")
    assert kfp.killed == []
    assert [r["status"] for r in kfp.recurring] == ["DISABLED"]
    assert "Schedule saev-incoming is switched off and fires no more" in said
    assert f"these are active: nightly-7 ({run['run_id']})." in said
    assert "`make unschedule NAME=saev-incoming WAIT=1`" in said
    assert f"`make cancel RUN={run['run_id']}`" in said
    run["state"] = "FAILED"
    client.ok("unschedule", "saev-incoming")
    assert kfp.recurring == kfp.killed == []


def test_unschedule_may_wait(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    client.ok(*SCHEDULE, DAILY)
    run = _busy(kfp)
    threading.Timer(0.4, lambda: run.update(state="SUCCEEDED")).start()
    kfp.fail("/runs$", 503, method="GET", times=1)  # waiting goes on
    said = client.ok("unschedule", "saev-incoming", "--wait").err
    assert said.count("waiting until these runs are over: nightly-7") == 1
    assert kfp.recurring == kfp.killed == []


def test_unschedule_may_be_forced(client: Client, kfp: KfpServer) -> None:
    """A run whose Workflow is gone never ends."""
    client.ok(*SCHEDULE, DAILY)
    _busy(kfp)
    client.ok("unschedule", "saev-incoming", "--force")
    assert kfp.recurring == []


def test_replacing_a_schedule_does_not_kill_runs(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, DAILY)
    run = _busy(kfp)
    result = client.ok(*SCHEDULE, "0 30 4 * * *")
    assert kfp.killed == []
    found = {r["trigger"]["cron_schedule"]["cron"]: r["status"] for r in kfp.recurring}
    assert found == {DAILY: "DISABLED", "0 30 4 * * *": "ENABLED"}
    assert "The old schedule saev-incoming is switched off and fires no more." in result.err
    assert f"nightly-7 ({run['run_id']})" in result.err
    run["state"] = "SUCCEEDED"
    client.ok(*SCHEDULE, "0 30 5 * * *")
    assert [r["trigger"]["cron_schedule"]["cron"] for r in kfp.recurring] == ["0 30 5 * * *"]
    assert kfp.killed == []


def test_unschedule_what_somebody_else_deletes_too(client: Client, kfp: KfpServer) -> None:
    client.ok(*SCHEDULE, DAILY)
    kfp.fail("/recurringruns/", 404, method="DELETE")
    client.ok("unschedule", "saev-incoming")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 3 * * *", "has 5 fields; Kubeflow wants 6"),
        ("0 3 * * *", "You probably mean '0 0 3 * * *'"),
        ("3 * *", "has 3 fields, expected 6"),
        ("", "has 0 fields, expected 6"),
        ("0 0 25 * * *", "the hour '25' is out of range. Expected 0 to 23"),
        ("0 60 * * * *", "the minute '60' is out of range"),
        ("0 0 3 * * 7", "the day of week '7' is not a day: Sunday is 0"),
        ("0 0 3 L * *", "the day of month 'L' is not a number"),
        ("0 0 3 * FOO *", "the month 'FOO' is not a number. Expected 1 to 12, or JAN FEB"),
        ("0 */0 * * * *", "has steps of 0"),
        ("0 5-1 * * * *", "begins after its end"),
        ("0 1-2-3 * * * *", "cannot be read"),
        ("0 0 0 30 2 *", "never fires: no year has such a day"),
        ("* 0 3 * * *", "fires 60 times in a minute"),
        ("*/10 0 3 * * *", "You probably mean '0 0 3 * * *'"),
        ("@reboot", "has 1 fields"),
    ],
)
def test_a_wrong_cron_is_explained_without_a_request(
    client: Client, kfp: KfpServer, text: str, said: str
) -> None:
    assert said in client.fails(*SCHEDULE, text)
    assert kfp.requests == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DAILY, ["2026-11-26 03:00:00", "2026-11-27 03:00:00"]),
        ("@daily", ["2026-11-26 00:00:00", "2026-11-27 00:00:00"]),
        ("30 */20 * * * *", ["2026-11-25 03:00:30", "2026-11-25 03:20:30"]),
        ("0 30/10 4 ? * *", ["2026-11-25 04:30:00", "2026-11-25 04:40:00"]),
        ("0 0 0 * * mon-wed", ["2026-11-30 00:00:00", "2026-12-01 00:00:00"]),
        ("0 0 0 13 * FRI", ["2026-11-27 00:00:00", "2026-12-04 00:00:00"]),  # either day
        ("0 0 0 29 FEB *", ["2028-02-29 00:00:00"]),
        ("0 5,3 3 * * *", ["2026-11-25 03:03:00", "2026-11-25 03:05:00"]),
    ],
)
def test_the_next_firings(text: str, expected: list[str]) -> None:
    """As github.com/robfig/cron v1.2.0 tells them."""
    after = datetime.datetime(2026, 11, 25, 3, 0, 0, tzinfo=datetime.UTC)
    assert [f"{t:%Y-%m-%d %H:%M:%S}" for t in cron.parse(text).next(after, 2)] == expected


@given(st.text(alphabet="0123456789*/-,? LMON#@", max_size=20))
def test_any_text_is_read_or_explained(text: str) -> None:
    try:
        parsed = cron.parse(text)
    except ConfigError as err:
        assert "CRON=" in str(err)  # noqa: PT017
    else:
        assert parsed.next(datetime.datetime.now(datetime.UTC))
