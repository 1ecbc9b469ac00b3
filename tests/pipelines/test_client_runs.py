"""`list`, `status`, `watch`, `logs`, `cancel` and the finding of runs."""

import io
import re

import pytest
import rich.console
from client import Client
from kfp_server import KfpServer, look, omitted, retried, step, task
from kube_server import KubeServer

from pipelines import connect, settings, watch


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)


def test_list_shows_the_newest_first(client: Client, kfp: KfpServer) -> None:
    for i in range(30):
        kfp.add_run(f"pets-{i}", "RUNNING" if i == 29 else "FAILED")
    lines = client.ok("list", "--n", "25").out.splitlines()
    assert lines[0].split() == ["STATE", "NAME", "DATASET", "AGE", "TOOK", "ID"]
    assert lines[1].split()[:3] == ["running", "pets-29", "s3://bucket/pets-29"]
    assert lines[2].split()[:2] == ["failed", "pets-28"]
    assert len(lines) == 1 + 25 + 1
    assert lines[-1].strip() == f"{kfp.url}/#/runs"


def test_names_are_text_and_keys_are_hidden(client: Client, kfp: KfpServer) -> None:
    """Brackets mean nothing. Another client may have started a run with a key in its dataset."""
    kfp.add_run("pets [/old]")
    place = "s3://AKIAEXAMPLE:SHH@bucket/[/red]pets/[old]"
    kfp.runs[-1]["runtime_config"]["parameters"]["dataset"] = place
    for command in ("list", "status"):
        out = client.ok(command).out
        assert "s3://***@bucket/[/red]pets/[old]" in out
        assert "pets [/old]" in out
        assert "SHH" not in out


def test_list_goes_through_pages(client: Client, kfp: KfpServer) -> None:
    for i in range(230):
        kfp.add_run(f"run-{i}")
    out = client.ok("list", "--n", "215").out
    assert "run-229 " in out
    assert "run-15 " in out
    assert "run-14 " not in out


def test_list_of_nothing(client: Client, kfp: KfpServer) -> None:
    assert client.ok("list").out.splitlines()[-1].strip() == f"{kfp.url}/#/runs"


def test_status_shows_steps_of_the_newest_run(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("old")
    extract = step("extract", *["SUCCEEDED"] * 3, *["RUNNING"] * 2, "FAILED")
    nodes = look("RUNNING", step("discover", "SUCCEEDED"), extract)
    kfp.add_run("new", **nodes)
    lines = [line.split() for line in client.ok("status").out.splitlines()]
    assert lines[0][:2] == ["new:", "running,"]
    assert ["dataset", "s3://bucket/new"] in lines
    by_step = {line[1]: line for line in lines if len(line) > 1}
    assert by_step["discover"][:3] == ["✓", "discover", "1/1"]
    assert by_step["extract"][:3] == ["✗", "extract", "3/6"]
    assert by_step["extract"][-4:] == ["2", "running,", "1", "failed"]
    assert by_step["train"] == ["·", "train"]


def test_a_finished_run_shows_only_what_ran(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("empty", **look("SUCCEEDED", step("discover", "SUCCEEDED")))
    out = client.ok("status").out
    assert "discover" in out
    assert "train" not in out


def _rows(client: Client) -> dict[str, list[str]]:
    """Step → the words of its line in `status`."""
    lines = [line.split() for line in client.ok("status").out.splitlines()]
    return {line[1]: line for line in lines if len(line) > 1 and line[0] in "✓✗▶·–?"}


@pytest.mark.parametrize("state", ["RUNNING", "FAILED"])
def test_steps_that_never_start_are_not_running(client: Client, kfp: KfpServer, state: str) -> None:
    later = [omitted("publish"), omitted("report")]
    kfp.add_run(
        "bad",
        **look(
            state,
            step("discover", "SUCCEEDED"),
            step("plan", "FAILED"),
            *later,
            step("outcome", "RUNNING" if state == "RUNNING" else "SUCCEEDED"),
        ),
    )
    rows = _rows(client)
    assert rows["plan"][:3] == ["✗", "plan", "0/1"]
    if state == "FAILED":
        assert list(rows) == ["discover", "plan", "outcome"]
    else:
        assert rows["publish"] == ["·", "publish"]
        assert rows["outcome"][0] == "▶"


@pytest.mark.parametrize(
    "names",
    [("discover", "plan", "publish"), ("discover", "plan-shards", "publish", "plan-training")],
    ids=["now", "0.1.0"],
)
def test_a_loop_with_nothing_to_do_says_so(
    client: Client, kfp: KfpServer, names: tuple[str, ...]
) -> None:
    before = [step(name, "SUCCEEDED") for name in names]
    kfp.add_run("again", **look("RUNNING", *before))
    rows = _rows(client)
    assert rows["extract"] == ["–", "extract", "nothing", "to", "do"]
    assert rows["train"] == ["·", "train"]  # its plan has only just ended
    kfp.add_run("over", **look("SUCCEEDED", *before, *(step(n, "SUCCEEDED") for n in (
        *(["plan-inference"] if "plan-training" in names else []), "summarise", "report", "outcome"
    ))))  # fmt: skip
    rows = _rows(client)
    assert [rows[name][2:] for name in ("extract", "train", "infer")] == [
        ["nothing", "to", "do"]
    ] * 3
    assert rows["summarise"][2] == "1/1"


def test_a_firing_without_new_datasets_says_so(client: Client, kfp: KfpServer) -> None:
    kfp.add_run(
        "idle", **look("SUCCEEDED", step("discover", "SUCCEEDED"), step("outcome", "SUCCEEDED"))
    )
    assert "There was nothing to process." in client.ok("status").out
    assert list(_rows(client)) == ["discover", "outcome"]


def test_attempts_of_a_step_are_no_parts(client: Client, kfp: KfpServer) -> None:
    kfp.add_run(
        "retried",
        **look(
            "RUNNING",
            retried("discover", "SUCCEEDED"),
            retried("extract", "FAILED", "SUCCEEDED"),
            retried("extract", "FAILED", "FAILED", "RUNNING"),
        ),
    )
    rows = _rows(client)
    assert rows["discover"][2] == "1/1"
    assert rows["extract"][:3] == ["▶", "extract", "1/2"]
    assert "failed" not in rows["extract"]


def test_states_that_froze_are_not_running(client: Client, kfp: KfpServer) -> None:
    """KFP 2.17 does not read the tasks of a Workflow above 1 MiB; the run's own state it does."""
    kfp.add_run("big", **look("SUCCEEDED", step("summarise", "RUNNING", "RUNNING")))
    row = _rows(client)["summarise"]
    assert row[:3] == ["?", "summarise", "0/2"]
    assert "running" not in row
    assert "2 not reported to the end" in " ".join(row)


def _history(*states: str) -> list[dict[str, str]]:
    return [{"update_time": "2026-11-25T01:00:00Z", "state": state} for state in states]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (("PENDING", "RUNNING", "CANCELING", "FAILED"), "canceled"),
        (("PENDING", "RUNNING", "CANCELING", "RUNNING", "FAILED"), "canceled"),
        (("PENDING", "RUNNING", "CANCELING"), "canceled"),
        (("PENDING", "RUNNING", "FAILED"), "failed"),
        (("RUNNING", "CANCELING", "FAILED", "RUNNING", "FAILED"), "failed"),  # retried
        ((), "failed"),
    ],
)
def test_a_canceled_run_is_called_that(
    client: Client, kfp: KfpServer, history: tuple[str, ...], expected: str
) -> None:
    """KFP ends it as failed, and so the step that it was in."""
    nodes = look("FAILED", step("discover", "FAILED"), step("outcome", "SUCCEEDED"))
    kfp.add_run("pets", **nodes, state_history=_history(*history))
    assert f"pets: {expected}," in client.ok("status").out
    assert client.ok("list").out.splitlines()[1].split()[0] == expected
    result = client("watch")
    assert result.status == 1
    said = result.err.splitlines()[-1]
    assert ("pets was canceled after" in said) == (expected == "canceled")
    assert ("pets failed in step discover" in said) == (expected == "failed")


def test_a_run_that_argo_ended_is_called_that(
    client: Client, kfp: KfpServer, kube: KubeServer
) -> None:
    """For its size: no step failed, KFP has no error, and the tasks' states froze long before."""
    parts = step("infer", *["SUCCEEDED"] * 40, "RUNNING")
    run = kfp.add_run("big", **look("FAILED", step("discover", "SUCCEEDED"), parts))
    said = client("watch").err.splitlines()[-1]
    assert "big was ended by Argo after" in said
    assert "though no step failed. Most likely it had more loop iterations than" in said
    assert "unknown" not in said
    assert "smaller n_parts" in said
    assert "It was ended by Argo after" in client.ok("status").out
    message = "workflow is longer than total allowed size for compression"
    kube.add(
        "workflows", "saev-x", "kubeflow",
        labels={"pipeline/runid": run["run_id"]}, status={"phase": "Error", "message": message},
    )  # fmt: skip
    assert f"no step failed. Argo says: {message}." in client("watch").err.splitlines()[-1]


def test_a_small_run_that_argo_ended_is_not_called_large(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("odd", **look("FAILED", step("discover", "SUCCEEDED")))
    said = client("watch").err.splitlines()[-1]
    assert "was ended by Argo" in said
    assert "No reason is given" in said


def test_a_loops_driver_that_fails_is_named(client: Client, kfp: KfpServer) -> None:
    nodes = look("FAILED", step("discover", "SUCCEEDED"), [task("for-loop-2-driver", "FAILED")])
    kfp.add_run("bad", **nodes)
    assert "bad failed in step for-loop-2-driver" in client("watch").err.splitlines()[-1]


def test_status_without_tasks(client: Client, kfp: KfpServer) -> None:
    """A list of tasks may be missing altogether, as before the first report of the workflow."""
    kfp.add_run("young", "PENDING")
    assert "young: pending" in client.ok("status").out


def test_status_of_a_failed_run_says_why(client: Client, kfp: KfpServer) -> None:
    error = {"code": 13, "message": "Pod was evicted"}
    kfp.add_run("bad", **look("FAILED", [task("train", "FAILED")], error=error))
    assert "KFP says: Pod was evicted" in client.ok("status").out


def test_status_without_runs(client: Client, kfp: KfpServer) -> None:
    assert "There are no runs yet" in client.fails("status")


@pytest.mark.parametrize("how", ["id", "prefix", "name", "name's beginning", "url"])
def test_a_run_is_found(client: Client, kfp: KfpServer, how: str) -> None:
    kfp.add_run("cats-1")
    run = kfp.add_run("pets-1")
    kfp.add_run("dogs-1")
    which = {
        "id": run["run_id"],
        "prefix": run["run_id"][:13],
        "name": "pets-1",
        "name's beginning": "pets",
        "url": f"{kfp.url}/#/runs/details/{run['run_id']}",
    }[how]
    assert "pets-1: succeeded" in client.ok("status", which).out


def test_which_run_must_be_clear(client: Client, kfp: KfpServer) -> None:
    runs = [kfp.add_run("pets"), kfp.add_run("pets")]
    said = client.fails("status", "pets")
    assert "Several runs are called 'pets'" in said
    assert all(run["run_id"] in said for run in runs)


def test_a_run_that_is_not_there(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("pets")
    said = client.fails("cancel", "cats")
    assert "There is no run 'cats', neither by id nor by name. `make list` shows them." in said


def test_cancel(client: Client, kfp: KfpServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    assert "pets is being canceled" in client.ok("cancel", "pets").err
    assert run["state"] == "CANCELING"


def test_cancel_what_is_over(client: Client, kfp: KfpServer) -> None:
    run = kfp.add_run("pets")
    assert "pets is over already: succeeded" in client.ok("cancel", "pets").err
    assert run["state"] == "SUCCEEDED"


def test_cancel_needs_a_run(client: Client, kfp: KfpServer) -> None:
    """The newest is no default for something that destroys."""
    kfp.add_run("pets", "RUNNING")
    assert client("cancel").status == 2
    assert "No run is named" in client.fails("cancel", "")
    assert "No schedule is named" in client.fails("unschedule", "")
    assert kfp.requests == []


def test_watch_joins_a_run(client: Client, kfp: KfpServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    kfp.scripts[run["run_id"]] = [
        look("RUNNING"),
        look("RUNNING", step("discover", "RUNNING")),
        look("FAILED", step("discover", "FAILED")),
    ]
    result = client("watch")
    assert result.status == 1
    assert "discover: 0/1 done, 1 running" in result.err
    assert "pets failed in step discover" in result.err


def test_a_shared_kfp_gets_the_namespace(
    client: Client, shared_kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_kfp.add_run("pets")
    assert "Set KFP_NAMESPACE" in client.fails("list")
    assert "pets" in client.ok("list", "--namespace", "team-a").out


# --- Logs --------------------------------------------------------------------------------------


def _pod(kube: KubeServer, name: str, run_id: str, step_name: str, **status: object) -> None:
    labels = {"pipeline/runid": run_id, "app.kubernetes.io/component": step_name}
    spec = {"containers": [{"name": "main", "image": "i"}]}
    kube.add("pods", name, "kubeflow", labels=labels, spec=spec, status=status)


def test_logs_of_all_steps_in_order(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    for name in ("discover", "extract"):
        _pod(kube, f"p-{name}", run["run_id"], name, phase="Succeeded")
        kube.logs[f"p-{name}"] = f"log of {name}\n"
    _pod(kube, "p-other", "another-run", "discover", phase="Succeeded")
    kube.logs["p-other"] = "log of another run\n"
    kube.add(
        "pods", "driver", "kubeflow",
        labels={"pipeline/runid": run["run_id"]}, status={"phase": "Succeeded"},
    )  # fmt: skip
    out = client.ok("logs").out
    assert out.index("log of discover") < out.index("log of extract")
    assert "another run" not in out
    assert "driver" not in out


@pytest.mark.parametrize("kept", [False, True])
def test_what_failed_first_is_said_last(
    client: Client, kfp: KfpServer, kube: KubeServer, kept: bool
) -> None:
    """The exit handler cannot reach the storage either, and its log comes after the cause."""
    failed = [step("discover", "FAILED"), step("outcome", "FAILED")]
    run = kfp.add_run("pets", **look("FAILED", *failed))
    for name in ("discover", "outcome"):
        log = f"a line\nsaev: permanent error: cause of {name}\nF1127 1:2 launcher.go:9] exit 1\n"
        if kept:
            kfp.kept[f"{name}-1"] = log
            (node,) = (t for t in run["run_details"]["task_details"] if t["display_name"] == name)
            node["child_tasks"] = [{"pod_name": f"{name}-1"}]
        else:
            _pod(kube, f"p-{name}", run["run_id"], name, phase="Failed")
            kube.logs[f"p-{name}"] = log
    out = client.ok("logs").out
    assert out.index("error: cause of discover") < out.index("error: cause of outcome")
    assert out.splitlines()[-1] == "discover failed first: cause of discover"
    assert "failed first" not in client.ok("logs", "--step", "outcome").out
    if not kept:
        assert client.ok("status").out.splitlines()[-1] == (
            "discover failed first: cause of discover"
        )


def test_logs_of_one_step(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    for name in ("plan", "extract"):
        _pod(kube, f"p-{name}", run["run_id"], name, phase="Succeeded")
        kube.logs[f"p-{name}"] = "".join(f"{name} {i}\n" for i in range(500))
    out = client.ok("logs", "--step", "plan", "--tail", "10").out
    assert client.ok("logs", "--step", "plan-shards", "--tail", "10").out == out
    assert "plan 499" in out
    assert "plan 489" not in out
    assert "extract" not in out
    assert "extract 0\n" in client.ok("logs", "--step", "extract", "--tail", "0").out


def test_logs_of_a_machine(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    """Kubeflow Trainer wants another name for the container of its pods."""
    run = kfp.add_run("pets", "RUNNING")
    _pod(kube, "machine", run["run_id"], "train", phase="Running")
    kube.objects["pods", "kubeflow", "machine"]["spec"]["containers"][0]["name"] = "node"
    kube.logs["machine"] = "Continuing at step 20\n"
    assert "Continuing at step 20" in client.ok("logs", "--step", "train").out


def test_logs_are_not_markup(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    _pod(kube, "p", run["run_id"], "train", phase="Running")
    kube.logs["p"] = '{"step": 1, "loss": [0.5]} [bold]x[/bold] Größe ' + "w" * 300 + "\n"
    assert kube.logs["p"] in client.ok("logs").out


def test_logs_of_a_pod_that_waits_say_why(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    waiting = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    waiting["message"] = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
    _pod(kube, "p", run["run_id"], "train", phase="Pending", conditions=[waiting])
    out = client.ok("logs").out
    assert "Unschedulable: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu." in out


def test_logs_that_are_gone(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run("pets")
    said = client.fails("logs")
    assert "Kubernetes has no pods of run pets in namespace kubeflow" in said
    assert f"/#/runs/details/{run['run_id']} may show logs" in said


def _kept(kfp: KfpServer) -> None:
    """A run whose pods are gone: extract was tried twice, the log of train was not archived."""
    nodes = [*retried("discover", "SUCCEEDED"), *retried("extract", "FAILED", "SUCCEEDED")]
    nodes += step("train", "SUCCEEDED")
    children = {"discover": ["w-1"], "extract": ["w-2", "w-3"], "train": ["w-4"]}
    for node in nodes:
        found = children.get(node["display_name"], [])
        node["child_tasks"] = [{"pod_name": name} for name in found]
    kfp.add_run("pets", **look("SUCCEEDED", nodes))
    kfp.kept = {"w-1": "looked\n", "w-2": "first try\n", "w-3": "1\n2\n3 Größe [x]\n"}


def test_logs_of_pods_that_are_gone_are_those_that_kfp_keeps(
    client: Client, kfp: KfpServer, kube: KubeServer
) -> None:
    _kept(kfp)
    lines = client.ok("logs").out.splitlines()
    heads = [line.split()[0:2] for line in lines if "kept by KFP" in line]
    assert heads == [["discover", "w-1"], ["extract", "w-2"], ["extract", "w-3"]]
    assert [line for line in lines if "kept by KFP" not in line] == [
        "looked", "first try", "1", "2", "3 Größe [x]"
    ]  # fmt: skip
    lines = client.ok("logs", "--step", "extract", "--tail", "1").out.splitlines()
    assert [line for line in lines if "kept by KFP" not in line] == ["first try", "3 Größe [x]"]
    assert "KFP keeps none" in client.fails("logs", "--step", "train")


def test_kept_logs_need_no_kubernetes(client: Client, kfp: KfpServer) -> None:
    _kept(kfp)
    assert "looked" in client.ok("logs", "--step", "discover").out
    assert "logs and the doctor need Kubernetes" in client.fails("logs", "--step", "train")


def test_kept_logs_behind_the_ui(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    """Which does not pass their address on."""
    _kept(kfp)
    kfp.answer_html("/apis/v1alpha1/")
    said = client.fails("logs")
    assert "KFP does not serve the ones that it keeps at this address" in said
    assert "under a step's Logs" in said


def test_logs_of_no_such_step(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    kfp.add_run("pets")
    assert "There is no step 'traim'; the steps are: discover," in client.fails(
        "logs", "--step", "traim"
    )


def test_logs_without_permission(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    kfp.add_run("pets")
    kube.statuses["pods"] = 403
    said = client.fails("logs")
    assert "Cannot list the pods of the run in namespace kubeflow" in said
    assert "403" in said


def test_logs_without_kubernetes(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("pets")
    assert "logs and the doctor need Kubernetes" in client.fails("logs")


def test_a_terminal_shows_a_table(kfp: KfpServer) -> None:
    run = kfp.add_run("pets", "RUNNING")
    kfp.scripts[run["run_id"]] = [
        look("RUNNING", step("discover", "SUCCEEDED"), step("extract", "SUCCEEDED", "RUNNING")),
        look("SUCCEEDED", step("discover", "SUCCEEDED"), step("extract", "SUCCEEDED", "SUCCEEDED")),
    ]
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=80)
    with connect.connect(settings.load({})) as connection:
        watch.wait(connection, run["run_id"], console)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"▶ +extract +1/2 ", shown)
    assert re.search(r"✓ +extract +2/2 ", shown)
    assert "pets succeeded after" in shown
