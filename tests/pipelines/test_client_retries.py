"""`submit --wait` retries a run whose failure a new pod may mend."""

import pytest
from client import Client
from kfp_server import KfpServer, look, step

from pipelines import watch
from saev import storage
from saev.launch import outcomes

SUBMIT = ("submit", "--dataset", "s3://bucket/pets", "--config", "config.toml", "--no-check")


@pytest.fixture
def root(kfp: KfpServer, s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage root that this machine sees, and runs that fail once and then succeed."""
    place = f"{s3}/retries/saev"
    monkeypatch.setenv("SAEV_ROOT", place)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    failed = look("FAILED", step("discover", "SUCCEEDED"), step("extract", "FAILED"))
    kfp.script = [failed, look("SUCCEEDED", step("discover", "SUCCEEDED"))]
    return place


def say(root: str, kfp: KfpServer, kind: str) -> None:
    """Let the step of every run that starts say why it fails."""

    def keep(run_id: str) -> None:
        word = {"step": "extract", "kind": kind, "error": "it is damaged"}
        storage.write_json(storage.join(outcomes.folder_of(root, run_id), "extract-1.json"), word)

    kfp.on_start = keep


@pytest.mark.parametrize("kind", ["", "passing"])
def test_what_a_new_pod_may_mend_is_retried(
    client: Client, kfp: KfpServer, root: str, kind: str
) -> None:
    if kind:
        say(root, kfp, kind)
    said = client.ok(*SUBMIT, "--wait").err
    assert sum(path.endswith(":retry") for _, path, _ in kfp.requests) == 1
    assert "failed in step extract, for a reason that may pass. Retry 1 of 2" in said


def test_a_permanent_failure_is_not_retried(client: Client, kfp: KfpServer, root: str) -> None:
    say(root, kfp, "permanent")
    result = client(*SUBMIT, "--wait")
    assert result.status == 1
    assert "is not retried: step extract failed permanently." in result.err
    assert not any(path.endswith(":retry") for _, path, _ in kfp.requests)


def test_retries_end_and_can_be_switched_off(client: Client, kfp: KfpServer, root: str) -> None:
    kfp.script = kfp.script[:1]
    assert client(*SUBMIT, "--wait", "--max-retries", "3").status == 1
    assert sum(path.endswith(":retry") for _, path, _ in kfp.requests) == 3
    assert client(*SUBMIT, "--wait", "--max-retries", "0").status == 1
    assert sum(path.endswith(":retry") for _, path, _ in kfp.requests) == 3


def test_a_canceled_run_is_not_retried(client: Client, kfp: KfpServer, root: str) -> None:
    time = "2026-11-25T01:00:00Z"
    history = [{"state": state, "update_time": time} for state in ("CANCELING", "FAILED")]
    kfp.script = [{**kfp.script[0], "state_history": history}]
    assert client(*SUBMIT, "--wait").status == 1
    assert not any(path.endswith(":retry") for _, path, _ in kfp.requests)


def test_who_does_not_wait_is_told_that_nobody_retries(client: Client, kfp: KfpServer) -> None:
    said = " ".join(client.ok(*SUBMIT).err.split())
    assert "the run is not retried: press Retry in Kubeflow, or submit it again" in said
