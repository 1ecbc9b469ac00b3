"""`saev.launch` with a real Kubernetes API and the real Job controller; the test is the kubelet."""

import collections
import os
import signal
import subprocess
import sys
import threading
import typing as tp
import uuid
from pathlib import Path

import pytest
from kubelet import DISRUPTED, RUNNING, SUCCEEDED, Json, Kubelet, exited, until
from kubernetes import client, config
from launching import slots
from servers import KubernetesApi

from saev.errors import ConfigError, LaunchError
from saev.launch import follow
from saev.launch.cluster import Cluster, Me, Resource
from saev.launch.jobs import JOBS
from saev.launch.pods import RUN_LABEL
from saev.progress import Progress

INDEX = "batch.kubernetes.io/job-completion-index"


@pytest.fixture(scope="module")
def api(kubernetes_api: KubernetesApi) -> client.ApiClient:
    """An administrator's client."""
    return config.new_client_from_config(str(kubernetes_api.kubeconfig))


@pytest.fixture
def cluster(api: client.ApiClient) -> Cluster:
    """A namespace of its own, in which pods have to be restricted."""
    name = f"team-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": name, "labels": labels}})
    account = {"metadata": {"name": "steps"}}
    core.create_namespaced_service_account(name, account)
    return Cluster(api, name)


ME = Me("steps", None)


def test_lost_pods_are_replaced_and_what_is_permanent_is_not(
    cluster: Cluster, api: client.ApiClient
) -> None:
    ends = {
        "0": [SUCCEEDED],
        "1": [DISRUPTED, SUCCEEDED],
        "2": [exited(137), SUCCEEDED],
        "3": [exited(65, "a line\nsaev: permanent error: img.png is damaged. Delete it.\n")],
        "4": [exited(1), exited(1, "saev: passing error, tried 4 times: S3 is away. Retry it.\n")],
    }
    left = {index: list(statuses) for index, statuses in ends.items()}
    seen: collections.Counter[str] = collections.Counter()

    def become(pod: Json) -> Json:
        index = pod["metadata"]["labels"][INDEX]
        seen[index] += 1
        return left[index].pop(0)

    work = slots("run", n=5, me=ME)
    with Kubelet(api, cluster.namespace, become).working(), pytest.raises(LaunchError) as caught:
        follow.run(cluster, work, Progress(quiet=True))
    # Retries are 1 (tests/e2e/launching.py), which a disruption does not count against.
    assert seen == {index: len(statuses) for index, statuses in ends.items()}
    assert "3 of 5 slots of train done, 2 failed" in str(caught.value)
    assert "slot 3 (permanent): img.png is damaged. Delete it." in str(caught.value)
    assert "slot 4 (passing): S3 is away. Retry it." in str(caught.value)
    assert not caught.value.passing
    assert caught.value.spent

    # The next try replaces it.
    before = cluster.get(JOBS, work.manifest["metadata"]["name"])
    with Kubelet(api, cluster.namespace, lambda pod: SUCCEEDED).working():
        follow.run(cluster, work, Progress(quiet=True))
    after = cluster.get(JOBS, work.manifest["metadata"]["name"])
    assert before
    assert after
    assert before["metadata"]["uid"] != after["metadata"]["uid"]
    assert work.state(after) == follow.State("done", "5 of 5 slots of train done")
    # One that is done stays, and is not made again.
    follow.run(cluster, work, Progress(quiet=True))


def launch(kubernetes_api: KubernetesApi, cluster: Cluster) -> "subprocess.Popen[bytes]":
    """A launching pod's process."""
    place = Path(__file__).parent / "launching.py"
    env = {**os.environ, "KUBECONFIG": str(kubernetes_api.kubeconfig)}
    return subprocess.Popen([sys.executable, place, cluster.namespace, "run"], env=env)


def uid_of(cluster: Cluster) -> str:
    found = cluster.listed(JOBS, {RUN_LABEL: "run"})
    return str(found[0]["metadata"]["uid"]) if found else ""


def test_a_launching_pod_that_is_lost_leaves_the_job_to_the_next(
    cluster: Cluster, api: client.ApiClient, kubernetes_api: KubernetesApi
) -> None:
    first = launch(kubernetes_api, cluster)
    until(lambda: uid_of(cluster) != "")
    uid = uid_of(cluster)
    first.kill()
    first.wait()
    with Kubelet(api, cluster.namespace, lambda pod: SUCCEEDED).working():
        assert launch(kubernetes_api, cluster).wait() == 0
    assert uid_of(cluster) == uid


def test_a_launching_pod_that_is_stopped_stops_its_pods(
    cluster: Cluster, api: client.ApiClient, kubernetes_api: KubernetesApi
) -> None:
    kubelet = Kubelet(api, cluster.namespace, lambda pod: RUNNING)
    process = launch(kubernetes_api, cluster)
    with kubelet.working():
        until(lambda: len(kubelet.started) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert uid_of(cluster) == ""
    assert cluster.pods("") == []


def test_work_whose_claim_is_lost_stops(cluster: Cluster) -> None:
    progress = Progress(quiet=True)

    def check() -> None:
        if uid_of(cluster):
            raise ConfigError("Run run no longer has the claim.")

    progress.safe_point = check
    with pytest.raises(ConfigError, match="no longer has the claim"):
        follow.run(cluster, slots("run", me=ME), progress)
    assert uid_of(cluster) == ""


def test_a_queue_starts_it(
    cluster: Cluster, api: client.ApiClient, caplog: pytest.LogCaptureFixture
) -> None:
    """As Kueue does: it also changes the pods' node selector."""
    caplog.set_level("INFO")
    work = slots("run", me=ME, queue="gpus")
    name = work.manifest["metadata"]["name"]
    assert work.manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    failures: list[BaseException] = []

    def run() -> None:
        try:
            follow.run(cluster, work, Progress(quiet=True))
        except BaseException as err:
            failures.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: "suspended, waits for gpus" in caplog.text)
    assert cluster.pods("") == []
    admitted = {"suspend": False, "template": {"spec": {"nodeSelector": {"pool": "a100"}}}}
    batch = client.BatchV1Api(api)
    batch.patch_namespaced_job(name, cluster.namespace, {"spec": admitted})
    with Kubelet(api, cluster.namespace, lambda pod: SUCCEEDED).working():
        thread.join()
    assert not failures
    uid = uid_of(cluster)
    follow.run(cluster, work, Progress(quiet=True))  # it is still the same
    assert uid_of(cluster) == uid


def test_somebody_else_deletes_it(cluster: Cluster, api: client.ApiClient) -> None:
    work = slots("run", me=ME)

    def become(pod: Json) -> Json:
        cluster.delete(JOBS, work.manifest["metadata"]["name"])
        return RUNNING

    kubelet = Kubelet(api, cluster.namespace, become)
    with kubelet.working(), pytest.raises(LaunchError, match="was deleted by somebody") as caught:
        follow.run(cluster, work, Progress(quiet=True))
    assert caught.value.passing
    assert not caught.value.spent


def test_the_exit_handler_stops_what_its_run_has_started(
    cluster: Cluster, api: client.ApiClient
) -> None:
    with Kubelet(api, cluster.namespace, lambda pod: SUCCEEDED).working():
        follow.run(cluster, slots("over", me=ME), Progress(quiet=True))
    made = {run: slots(run, me=ME).manifest for run in ("mine", "theirs")}
    for manifest in made.values():
        cluster.create(JOBS, manifest)
    unknown = Resource("nobody.test", "v1", "things", "Thing", "thing")
    kinds = (JOBS, unknown)
    assert follow.stop_all(cluster, kinds, "mine", 60) == [made["mine"]["metadata"]["name"]]
    assert follow.stop_all(cluster, kinds, "over", 60) == []
    assert cluster.listed(JOBS, {RUN_LABEL: "mine"}) == []
    assert len(cluster.listed(JOBS, {RUN_LABEL: "theirs"})) == 1
    assert len(cluster.listed(JOBS, {RUN_LABEL: "over"})) == 1


def test_it_goes_with_the_workflow(cluster: Cluster, api: client.ApiClient) -> None:
    """A config map is the Workflow here, which the API server does not know."""
    core, space = client.CoreV1Api(api), cluster.namespace
    workflow = core.create_namespaced_config_map(space, {"metadata": {"name": "saev-abc"}})
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "saev-abc"}
    reference |= {"uid": workflow.metadata.uid}
    core.create_namespaced_pod(space, launching_pod(reference))
    me = cluster.me({"KFP_POD_NAME": "launching", "HOSTNAME": "shortened"})
    assert me == Me("steps", reference)
    cluster.create(JOBS, slots("run", me=me).manifest)
    core.delete_namespaced_config_map("saev-abc", space)
    until(lambda: uid_of(cluster) == "")


def launching_pod(owner: Json) -> Json:
    restricted = {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    container = {"name": "main", "image": "x", "securityContext": restricted}
    owner = {**owner, "controller": True, "blockOwnerDeletion": True}
    return {
        "metadata": {"name": "launching", "ownerReferences": [owner]},
        "spec": {"serviceAccountName": "steps", "containers": [container]},
    }


def test_what_is_refused_is_one_sentence(
    cluster: Cluster, kubernetes_api: KubernetesApi, tmp_path: Path
) -> None:
    nobody = config.new_client_from_config(str(kubernetes_api.kubeconfig))
    nobody.set_default_header("Impersonate-User", "nobody")
    with pytest.raises(LaunchError, match="COMPONENTS=jobs") as caught:
        follow.run(Cluster(nobody, cluster.namespace), slots("run"), Progress(quiet=True))
    assert not caught.value.passing
    wrong: dict[str, tp.Any] = slots("run", me=ME).manifest
    wrong["spec"]["template"]["spec"]["activeDeadlineSeconds"] = -1
    with pytest.raises(LaunchError, match="must be between 1 and"):
        cluster.create(JOBS, wrong)
