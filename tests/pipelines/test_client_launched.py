"""The client with launch = "job": slots are pods of Jobs, which KFP does not see."""

import typing as tp
from pathlib import Path

import pytest
from client import Client
from kfp_server import KfpServer, look, step
from kube_server import KubeServer

from pipelines import watch


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def settings(home: Path) -> Path:
    path = home / "cluster.toml"
    path.write_text('[compile]\nlaunch = "job"\n')
    return path


def add_job(kube: KubeServer, run_id: str, name: str, completions: int, **status: tp.Any) -> None:
    labels = {"pipeline/runid": run_id, "app.kubernetes.io/component": name}
    pod = {"spec": {"containers": [{"name": "main", "image": "i"}], "restartPolicy": "Never"}}
    spec = {"completions": completions, "template": pod}
    kube.add("jobs", f"saev-{name}", "kubeflow", labels=labels, spec=spec, status=status)


def test_status_shows_the_slots(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run(
        "pets", **look("RUNNING", step("extract", "SUCCEEDED"), step("train", "RUNNING"))
    )
    add_job(kube, run["run_id"], "extract", 6, succeeded=6)
    add_job(
        kube, run["run_id"], "train", 40,
        succeeded=12, active=8, ready=5, failed=3, failedIndexes="3,7-8",
    )  # fmt: skip
    add_job(kube, "another-run", "infer", 9, active=9)
    lines = [" ".join(line.split()) for line in client.ok("status").out.splitlines()]
    assert any(line.startswith("✓ extract 6/6") for line in lines)
    (train,) = (line for line in lines if " train " in line)
    assert train.startswith("✗ train 12/40")
    assert train.endswith("5 running, 3 failed")
    assert "· infer" in lines


def test_watch_tells_changes_of_slots(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    run = kfp.add_run("pets", **look("SUCCEEDED", step("train", "SUCCEEDED")))
    add_job(kube, run["run_id"], "train", 3, succeeded=3)
    assert "train: 3/3 done" in client.ok("watch").err


@pytest.mark.parametrize("reason", ["forbidden", "loops", "no Job"])
def test_without_jobs_kfp_says_what_it_knows(
    client: Client, kfp: KfpServer, kube: KubeServer, settings: Path, reason: str
) -> None:
    run = kfp.add_run("pets", **look("RUNNING", step("train", "RUNNING")))
    if reason != "no Job":
        add_job(kube, run["run_id"], "train", 40, succeeded=12)
    if reason == "forbidden":
        kube.statuses["jobs"] = 403
    if reason == "loops":
        settings.write_text("")
    (train,) = (line for line in client.ok("status").out.splitlines() if " train " in line)
    assert train.split()[:3] == ["▶", "train", "0/1"]


def test_status_without_a_kubeconfig(client: Client, kfp: KfpServer) -> None:
    kfp.add_run("pets", **look("RUNNING", step("train", "RUNNING")))
    assert "0/1" in client.ok("status").out


def test_the_end_of_a_failed_step_is_told_by_who_launched(
    client: Client, kfp: KfpServer, kube: KubeServer
) -> None:
    run = kfp.add_run("pets", **look("FAILED", step("train", "FAILED")))
    labels = {"pipeline/runid": run["run_id"], "app.kubernetes.io/component": "train"}
    spec = {"containers": [{"name": "main", "image": "i"}]}
    of_kfp = {**labels, "pipelines.kubeflow.org/v2_component": "true"}
    failed = {"phase": "Failed"}
    kube.add("pods", "launching", "kubeflow", labels=of_kfp, spec=spec, status=failed)
    kube.add("pods", "saev-train-x-3-abc", "kubeflow", labels=labels, spec=spec, status=failed)
    kube.logs["launching"] = "saev: permanent error: 2 of 6 slots of train failed.\n"
    kube.logs["saev-train-x-3-abc"] = "saev: permanent error: img.png is damaged.\n"
    said = client("watch").err.splitlines()[-1]
    assert "The step's error: 2 of 6 slots of train failed." in said
    logs = client.ok("logs", "--step", "train").out
    assert "img.png is damaged" in logs


def submit(client: Client, *more: str) -> tuple[str, ...]:
    return (
        "submit",
        "--dataset",
        "s3://bucket/pets",
        "--config",
        "config.toml",
        "--no-check",
        *more,
    )


def test_any_number_of_slots_fits(client: Client, kfp: KfpServer, settings: Path) -> None:
    many = submit(client, "--param", "n_parts=500")
    client.ok(*many)
    settings.write_text("")
    assert "n_parts = 500" in client.fails(*many)


def test_a_queue_is_for_jobs(client: Client, kfp: KfpServer, settings: Path) -> None:
    queued = submit(client, "--param", "queue=gpus")
    client.ok(*queued)
    assert "expected a Kubernetes name" in client.fails(*submit(client, "--param", "queue=A_B"))
    settings.write_text("")
    assert 'Set launch = "job"' in client.fails(*queued)


def test_doctor_asks_for_the_rights(client: Client, kube: KubeServer, settings: Path) -> None:
    kube.add("namespaces", "kubeflow")
    kube.add("serviceaccounts", "saev-steps", "kubeflow")
    line = "service account saev-steps: "

    def found() -> str:
        out = client("doctor", "--no-pod").out
        return out[out.index(line) :].partition("\n" + "ok")[0]

    assert "may do all 12 things" in found()
    kube.denied = {"create jobs", "get pods/log"}
    assert "it may not create jobs.batch, get pods/log" in found()
    assert 'COMPONENTS="… jobs"' in found()
    kube.denied = {"create jobs", "get configmaps"}  # then the whole installation is missing
    assert "COMPONENTS" not in found()
    settings.write_text("")
    kube.denied = {"create jobs"}
    assert "may do all 5 things" in found()
