"""`saev.launch` with a real Kubernetes API and the real Job controller; the test is the kubelet."""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import typing as tp
import uuid
from pathlib import Path

import pytest
import yaml
from kubelet import DISRUPTED, RUNNING, SUCCEEDED, Json, Kubelet, exited, until
from kubernetes import client, config, utils
from launching import slots as some_slots
from servers import KubernetesApi

from saev.config.steps import LaunchStep
from saev.errors import ConfigError, LaunchError
from saev.launch import follow
from saev.launch.cluster import Cluster, Me, Resource
from saev.launch.jobs import JOBS
from saev.launch.pods import RUN_LABEL
from saev.progress import Progress
from saev.steps import jobs, launching
from saev.steps.discover import Dataset

K8S = Path(__file__).parents[2] / "k8s"
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

    work = some_slots("run", n=5, me=ME)
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
    env = {**os.environ, "KUBECONFIG": str(kubernetes_api.kubeconfig), "KFP_POD_NAME": "launching"}
    return subprocess.Popen([sys.executable, place, cluster.namespace, "run"], env=env)


def uid_of(cluster: Cluster) -> str:
    found = cluster.listed(JOBS, {RUN_LABEL: "run"})
    return str(found[0]["metadata"]["uid"]) if found else ""


def test_a_launching_pod_that_is_lost_leaves_the_job_to_the_next(
    cluster: Cluster, api: client.ApiClient, kubernetes_api: KubernetesApi
) -> None:
    workflow(cluster, api)
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
    workflow(cluster, api)
    process = launch(kubernetes_api, cluster)
    until(lambda: len(cluster.pods(INDEX)) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert uid_of(cluster) == ""
    assert cluster.pods(INDEX) == []


def test_a_launching_pod_that_is_deleted_leaves_the_job_to_the_next(
    cluster: Cluster, api: client.ApiClient, kubernetes_api: KubernetesApi
) -> None:
    """As by the eviction API: Argo starts another one."""
    workflow(cluster, api, finalizers=["saev.test/stays"])
    process = launch(kubernetes_api, cluster)
    until(lambda: len(cluster.pods(INDEX)) == 2)
    client.CoreV1Api(api).delete_namespaced_pod("launching", cluster.namespace)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert len(cluster.pods(INDEX)) == 2


def test_work_whose_claim_is_lost_stops(cluster: Cluster) -> None:
    progress = Progress(quiet=True)

    def check() -> None:
        if uid_of(cluster):
            raise ConfigError("Run run no longer has the claim.")

    progress.safe_point = check
    with pytest.raises(ConfigError, match="no longer has the claim"):
        follow.run(cluster, some_slots("run", me=ME), progress)
    assert uid_of(cluster) == ""


def test_a_queue_starts_it(
    cluster: Cluster, api: client.ApiClient, caplog: pytest.LogCaptureFixture
) -> None:
    """As Kueue does: it also changes the pods' node selector."""
    caplog.set_level("INFO")
    work = some_slots("run", me=ME, queue="gpus")
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
    work = some_slots("run", me=ME)

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
        follow.run(cluster, some_slots("over", me=ME), Progress(quiet=True))
    made = {run: some_slots(run, me=ME).manifest for run in ("mine", "theirs")}
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
    reference = workflow(cluster, api)
    me = cluster.me({"KFP_POD_NAME": "launching", "HOSTNAME": "shortened"})
    assert me == Me("steps", reference)
    cluster.create(JOBS, some_slots("run", me=me).manifest)
    client.CoreV1Api(api).delete_namespaced_config_map("saev-abc", cluster.namespace)
    until(lambda: uid_of(cluster) == "")


def workflow(cluster: Cluster, api: client.ApiClient, **more: tp.Any) -> Json:
    """Make a Workflow with its launching pod. Returns a reference to it.

    A config map is the Workflow here, which the API server does not know.
    """
    core, space = client.CoreV1Api(api), cluster.namespace
    made = core.create_namespaced_config_map(space, {"metadata": {"name": "saev-abc"}})
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "saev-abc"}
    reference |= {"uid": made.metadata.uid}
    pod = launching_pod(reference)
    pod["metadata"] |= more
    core.create_namespaced_pod(space, pod)
    return reference


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


def test_steps_with_the_component_may_do_all_of_it(
    cluster: Cluster,
    api: client.ApiClient,
    kubernetes_api: KubernetesApi,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The step itself, as the account of k8s/, with its Roles and nothing else."""
    core, space = client.CoreV1Api(api), cluster.namespace
    roles = ("base/service-account.yaml", "base/role.yaml", "components/jobs/role.yaml")
    made = [one for name in roles for one in yaml.safe_load_all((K8S / name).read_text())]
    utils.create_from_yaml(api, yaml_objects=made, namespace=space)
    ask = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = core.create_namespaced_service_account_token("saev-steps", space, ask).status.token
    theirs = client.Configuration(kubernetes_api.url, {"authorization": f"Bearer {token}"})
    theirs.ssl_ca_cert = str(kubernetes_api.ca)
    steps = Cluster(client.ApiClient(theirs), space)
    with pytest.raises(LaunchError, match="refuses to list daemonsets"):
        steps.listed(Resource("apps", "v1", "daemonsets", "DaemonSet", "name"), {})
    workflow(cluster, api)
    monkeypatch.setenv("KFP_POD_NAME", "launching")
    monkeypatch.setattr(Cluster, "of_this_pod", lambda: steps)

    url = jobs.make(str(tmp_path), "run", {}, Dataset("pets", "s3://b/pets", "f", "k", "", ""))
    job = jobs.read(url)
    slots = [[{"name": f"part {i} of 3"}] for i in (1, 2, 3)]
    jobs.write_plan(job, "plan", jobs.Plan("shards", [], {"extract": slots}))
    pods = {"step": "extract", "image": "saev:x", "gpus": 1, "timeout_seconds": 60}
    step = LaunchStep(job=url, step="extract", pods=json.dumps(pods), parallelism=2)
    commands: dict[str, list[str]] = {}

    def become(pod: Json) -> Json:
        number = pod["metadata"]["labels"].get(INDEX, "") if "labels" in pod["metadata"] else ""
        commands[number] = pod["spec"]["containers"][0].get("command", [])
        return SUCCEEDED

    with Kubelet(api, space, become).working():
        launching.launch(step, job, Progress(quiet=True))
    words = ["step", "extract", "--job", url, "--slot", "$(JOB_COMPLETION_INDEX)"]
    assert {i: command[3:] for i, command in commands.items() if i} == dict.fromkeys("012", words)
    cluster.create(JOBS, some_slots("run", me=ME).manifest)
    launching.stop("jobs", "run")
    assert len(cluster.listed(JOBS, {RUN_LABEL: "run"})) == 1  # the one that is over


def test_what_is_refused_is_one_sentence(
    cluster: Cluster, kubernetes_api: KubernetesApi, tmp_path: Path
) -> None:
    nobody = config.new_client_from_config(str(kubernetes_api.kubeconfig))
    nobody.set_default_header("Impersonate-User", "nobody")
    with pytest.raises(LaunchError, match="COMPONENTS=jobs") as caught:
        follow.run(Cluster(nobody, cluster.namespace), some_slots("run"), Progress(quiet=True))
    assert not caught.value.passing
    wrong: dict[str, tp.Any] = some_slots("run", me=ME).manifest
    wrong["spec"]["template"]["spec"]["activeDeadlineSeconds"] = -1
    with pytest.raises(LaunchError, match="must be between 1 and"):
        cluster.create(JOBS, wrong)
