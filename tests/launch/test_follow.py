"""What is read from the status of a Job and of its pods; tests/e2e/test_launch.py has real ones."""

import typing as tp

import pytest

from saev.launch import follow
from saev.launch.cluster import Me
from saev.launch.jobs import Slots, indexes
from saev.launch.pods import PodSettings

Json = dict[str, tp.Any]


def ended(code: int, said: str = "", why: str = "Error", **more: str) -> Json:
    """A pod whose container has ended."""
    terminated = {"exitCode": code, "message": said, "reason": why}
    status = {"name": "main", "state": {"terminated": terminated}}
    return {"metadata": {"name": "p"}, "status": {"containerStatuses": [status], **more}}


@pytest.mark.parametrize(
    ("pod", "is_permanent", "why"),
    [
        (ended(65, "x\nsaev: permanent error: a: b.\n"), True, "a: b."),
        (ended(1, "saev: passing error, tried 4 times: S3: away."), False, "S3: away."),
        (ended(1, "saev: passing error, tried once: no"), False, "no"),
        (ended(137, "", "OOMKilled"), False, "exit status 137, OOMKilled."),
        (ended(65, "cut off"), True, "exit status 65, Error."),
        (
            ended(143, "", "Error", reason="DeadlineExceeded", message="Pod was active too long"),
            False,
            "DeadlineExceeded: Pod was active too long",
        ),
        (
            {"metadata": {"name": "p"}, "status": {"reason": "Evicted", "message": "disk"}},
            False,
            "Evicted: disk",
        ),
        ({"metadata": {"name": "p"}, "status": {}}, False, "its pod failed and does not say why."),
        (None, False, "its pod is gone."),
    ],
)
def test_why_a_pod_failed(pod: Json | None, is_permanent: bool, why: str) -> None:
    found = follow.failure_of("slot 3", pod, "main")
    assert found == follow.Failure("slot 3", is_permanent, why, "p" if pod else "")


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
                    }
                ]
            },
            "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
        ),
        (
            {
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such"}}}
                ]
            },
            "ImagePullBackOff: no such",
        ),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, ""),
        ({"containerStatuses": [{"state": {"running": {}}}]}, ""),
        ({"conditions": [{"type": "PodScheduled", "status": "True"}]}, ""),
        ({}, ""),
    ],
)
def test_why_a_pod_waits(status: Json, why: str) -> None:
    assert follow.waits_for({"status": status}) == why


@pytest.mark.parametrize(
    ("text", "numbers"),
    # https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/#JobStatus
    [("", set()), ("7", {7}), ("1,3-5,7", {1, 3, 4, 5, 7}), ("0-2", {0, 1, 2})],
)
def test_indexes(text: str, numbers: set[int]) -> None:
    assert indexes(text) == numbers


def job(status: Json, **spec: tp.Any) -> Json:
    return {"metadata": {"name": "j"}, "spec": spec, "status": status}


@pytest.mark.parametrize(
    ("found", "phase", "text"),
    [
        (job({}), "running", "0 of 6 slots of train done, 0 running"),
        (
            job({"active": 3, "ready": 1, "succeeded": 2, "failedIndexes": "4"}),
            "running",
            "2 of 6 slots of train done, 1 failed, 1 running, 2 waiting for a node or starting",
        ),
        (job({}, suspend=True), "waiting", "suspended, waits for gpus to start it"),
        (
            job({"succeeded": 6, "conditions": [{"type": "Complete", "status": "True"}]}),
            "done",
            "6 of 6 slots of train done",
        ),
        (
            job(
                {
                    "succeeded": 4,
                    "failedIndexes": "1,5",
                    "conditions": [{"type": "Failed", "status": "True", "reason": "FailedIndexes"}],
                }
            ),
            "failed",
            "4 of 6 slots of train done, 2 failed",
        ),
        (
            job({"conditions": [{"type": "Failed", "status": "True", "message": "Job was bad"}]}),
            "failed",
            "0 of 6 slots of train done: Job was bad",
        ),
        (
            job({"conditions": [{"type": "Complete", "status": "False"}]}),
            "running",
            "0 of 6 slots of train done, 0 running",
        ),
    ],
)
def test_state_of_a_job(found: Json, phase: str, text: str) -> None:
    assert slots().state(found) == (phase, text)


def slots(**more: tp.Any) -> Slots:
    settings = PodSettings(step="train", image="saev:1", gpus=1, timeout_seconds=60)
    usual = {"n_slots": 6, "parallelism": 2, "job": "s3://b/j.json", "run_id": "r", "queue": "gpus"}
    return Slots(settings, ["x"], **{**usual, "me": Me("steps", None), **more})


def test_one_name_for_all_tries_of_a_step() -> None:
    """And another for another dataset of the run; what else differs is in the digest."""
    names = {
        key: slots(**more).manifest["metadata"]["name"]
        for key, more in {
            "it": {}, "planned anew": {"n_slots": 5}, "owned": {"me": Me("steps", {"uid": "1"})},
            "another dataset": {"job": "s3://b/k.json"}, "another run": {"run_id": "s"},
        }.items()
    }  # fmt: skip
    assert names["it"] == names["planned anew"] == names["owned"]
    assert len(set(names.values())) == 3
    assert all(len(name) <= 40 for name in names.values())  # pods add an index and a suffix


def test_as_many_pods_as_there_are_slots() -> None:
    assert slots(parallelism=2).manifest["spec"]["parallelism"] == 2
    assert slots(parallelism=9).manifest["spec"]["parallelism"] == 6
