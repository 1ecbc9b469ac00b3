"""`doctor`: every check when all is well, and what each says when it is not."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kube_server
import pytest
import yaml
from client import Client
from kfp_server import KfpServer
from kube_server import KubeServer

from pipelines.doctor import probe

GPU = "nvidia.com/gpu"
TAINT = {"key": GPU, "effect": "NoSchedule", "value": "present"}
TERMINATED = {"name": "main", "image": "i", "imageID": "", "ready": False, "restartCount": 0}


def _status(phase: str, **state: object) -> dict:
    return {"phase": phase, "containerStatuses": [{**TERMINATED, "state": state}]}


STORAGE = "storage, with the pods' credentials"
RAN = _status("Succeeded", terminated={"exitCode": 0})


@pytest.fixture
def cluster(kube: KubeServer, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> KubeServer:
    """A cluster where all is well, with 3 of 8 GPUs in use."""
    monkeypatch.setattr(probe, "POLL_SECONDS", 0.01)
    kube.add_kfp(int(kfp.url.rsplit(":", 1)[1]))
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kube.add("namespaces", "kubeflow", labels=labels)
    kube.add("serviceaccounts", "saev-steps", "kubeflow")
    kube.add("serviceaccounts", "saev-schedule", "kubeflow")
    keys = {"AWS_ACCESS_KEY_ID": "eA==", "AWS_SECRET_ACCESS_KEY": "eA=="}
    kube.add("secrets", "saev-storage", "kubeflow", data=keys)
    data = {"AWS_ENDPOINT_URL": "http://minio:9000"}
    kube.add("configmaps", "saev-config", "kubeflow", data=data)
    for name in ("a", "b"):
        status = {"allocatable": {GPU: "4", "cpu": "64"}}
        kube.add("nodes", name, spec={"taints": [TAINT]}, status=status)
    kube.add("nodes", "cpu", spec={}, status={"allocatable": {"cpu": "8"}})
    _gpu_pod(kube, "busy", "a", 3)
    _gpu_pod(kube, "over", "a", 4, phase="Succeeded")
    kube.pod_statuses = [{"phase": "Pending"}, RAN]
    kube.pod_log = "ok: write\nok: read\nok: create only if absent\nok: delete\ns3://bucket/saev\n"
    return kube


def _gpu_pod(kube: KubeServer, name: str, node: str, n: int, phase: str = "Running") -> None:
    container = {"name": "c", "image": "i", "resources": {"limits": {GPU: str(n)}}}
    spec = {"nodeName": node, "containers": [container]}
    kube.add("pods", name, "elsewhere", spec=spec, status={"phase": phase})


def _lines(client: Client, *argv: str, status: int) -> dict[str, str]:
    """What was checked → level and finding, with the remedy behind it."""
    result = client("doctor", *argv)
    assert result.status == status, result
    assert "Traceback" not in result.out + result.err
    found: dict[str, str] = {}
    what = ""
    for line in result.out.splitlines():
        match = re.match(r"(ok|warn|fail|skip) +([^:]+): (.*)", line)
        if match:
            what = match[2]
            found[what] = f"{match[1]}: {match[3]}"
        else:
            found[what] += f" {line.strip()}"
    return found


def test_all_is_well(client: Client, cluster: KubeServer, kfp: KfpServer) -> None:
    found = _lines(client, status=0)
    assert {text.split(":")[0] for text in found.values()} == {"ok"}
    assert found["Kubernetes API"].endswith("version 1.34.4")
    assert found["Kubeflow Pipelines API"] == f"ok: {kfp.url}, single-user, version 2.17.1"
    assert "enforced: restricted" in found["namespace kubeflow"]
    assert found["GPUs"] == f"ok: 8 {GPU} on 2 nodes, 5 free"
    assert found["secret saev-storage"] == "ok: it exists, with 2 keys"
    assert "http://minio:9000" in found["config map saev-config"]
    assert found["image"] == "ok: registry.test/saev:1 starts"
    assert found["storage, with the pods' credentials"] == (
        "ok: s3://bucket/saev: write, read, create only if absent, delete"
    )


def test_the_pod_is_like_a_step_and_is_deleted(
    client: Client, cluster: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_CPU_IMAGE", "registry.test/saev-cpu:1")
    _lines(client, "--dataset", "s3://bucket/pets", status=0)
    pod = cluster.created[0]
    assert pod["metadata"]["name"] in cluster.deleted
    assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "saev"
    spec = pod["spec"]
    assert spec["serviceAccountName"] == "saev-steps"
    [container] = spec["containers"]
    assert container["image"] == "registry.test/saev-cpu:1"
    assert container["command"] == (
        "python -m saev.steps.supervisor -- "
        "python -m saev step check --root s3://bucket/saev --dataset s3://bucket/pets".split()
    )
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    sources = {paths[volume["name"]]: volume for volume in spec["volumes"]}
    assert sources["/saev/secret"]["secret"]["secretName"] == "saev-storage"
    assert sources["/saev/config"]["configMap"]["name"] == "saev-config"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["activeDeadlineSeconds"] == 600
    assert "pipeline/runid" not in pod["metadata"]["labels"]  # so no run's logs show it


@pytest.mark.slow
@pytest.mark.parametrize("place", ["empty", "missing"])
def test_what_the_pod_prints_is_understood(
    client: Client,
    cluster: KubeServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
) -> None:
    """The command of its container, run here on a folder."""
    _lines(client, status=0)
    command = cluster.created[0]["spec"]["containers"][0]["command"]
    root = tmp_path if place == "empty" else Path("/proc/missing")
    here = {"python": sys.executable, "s3://bucket/saev": str(root)}
    done = subprocess.run(
        [here.get(word, word) for word in command],
        env={**os.environ, "SAEV_RETRIES": "0", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    cluster.pod_log = done.stdout
    if done.returncode:
        cluster.pod_statuses = [_status("Failed", terminated={"exitCode": done.returncode})]
    found = _lines(client, status=int(place == "missing"))[STORAGE]
    if place == "missing":
        assert found.startswith("fail: Cannot write /proc/missing/.tmp-check-")
        assert found.count("Cannot write") == 1
    else:
        assert found == "ok: s3://bucket/saev: write, read, create only if absent, delete"


def test_both_images_are_tried(
    client: Client, cluster: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_CPU_IMAGE", "registry.test/saev-cpu:1")
    found = _lines(client, status=0)
    assert found["small image"] == "ok: registry.test/saev-cpu:1 starts"
    assert found["runtime image"] == "ok: registry.test/saev:1 starts"
    images = {pod["spec"]["containers"][0]["image"] for pod in cluster.created}
    assert images == {"registry.test/saev-cpu:1", "registry.test/saev:1"}
    assert sorted(cluster.deleted) == sorted(pod["metadata"]["name"] for pod in cluster.created)
    missing = {"reason": "ImagePullBackOff", "message": "not found"}
    cluster.statuses_of_image["registry.test/saev:1"] = _status("Pending", waiting=missing)
    found = _lines(client, status=1)
    assert found["small image"].startswith("ok")
    assert "ImagePullBackOff not found Check SAEV_IMAGE," in found["runtime image"]
    assert len(cluster.deleted) == 4


def test_a_runtime_image_without_torch_is_no_runtime_image(
    client: Client, cluster: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_CPU_IMAGE", "registry.test/saev-cpu:1")
    ended = _status("Failed", terminated={"exitCode": 1, "reason": "Error"})
    cluster.statuses_of_image["registry.test/saev:1"] = ended
    cluster.pod_log = "Traceback\nModuleNotFoundError: No module named 'torch'\n"
    found = _lines(client, status=1)["runtime image"]
    assert "fail: registry.test/saev:1 starts, but ModuleNotFoundError" in found


def test_no_pod_starts_none(client: Client, cluster: KubeServer) -> None:
    assert _lines(client, "--no-pod", status=0)["pod"].startswith("skip")
    assert cluster.created == []


def test_a_volume_is_looked_at_and_mounted(
    client: Client, cluster: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_ROOT", "/data/saev")
    monkeypatch.setenv("SAEV_STORAGE", "pvc")
    cluster.add("storageclasses", "nfs", provisioner="nfs.test")
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"}
    status = {"phase": "Bound", "capacity": {"storage": "1Ti"}}
    cluster.add("persistentvolumeclaims", "saev-data", "kubeflow", spec=spec, status=status)
    found = _lines(client, status=0)
    assert found["volume claim saev-data"] == "ok: Bound, 1Ti, ReadWriteMany"
    assert found["storage class"] == "ok: nfs"
    assert "secret saev-storage" not in found
    assert {"name": "data", "mountPath": "/data"} in cluster.created[0]["spec"]["containers"][0][
        "volumeMounts"
    ]
    claim = cluster.objects["persistentvolumeclaims", "kubeflow", "saev-data"]
    claim["spec"]["accessModes"] = ["ReadWriteOnce"]
    assert (
        "Pods on several nodes need ReadWriteMany"
        in _lines(client, status=0)["volume claim saev-data"]
    )
    claim["status"]["phase"] = "Pending"
    assert "says what it waits for" in _lines(client, status=0)["volume claim saev-data"]
    claim["spec"]["storageClassName"] = "ceph"
    assert (
        "fail: ceph does not exist The cluster has: nfs."
        in _lines(client, status=1)["storage class"]
    )
    del cluster.objects["persistentvolumeclaims", "kubeflow", "saev-data"]
    found = _lines(client, status=1)
    assert "`make install OVERLAY=pvc` makes it" in found["volume claim saev-data"]
    assert "there is no default" in found["storage class"]


@pytest.mark.parametrize(
    ("plural", "name", "what", "level", "said"),
    [
        ("namespaces", "kubeflow", "namespace kubeflow", "fail", "Set KFP_NAMESPACE"),
        ("serviceaccounts", "saev-steps", "service account saev-steps", "fail", "`make install"),
        ("serviceaccounts", "saev-schedule", "service account saev-schedule", "warn", "`make inst"),
        ("secrets", "saev-storage", "secret saev-storage", "warn", "IRSA"),
        ("configmaps", "saev-config", "config map saev-config", "warn", "`make install`"),
    ],
)
def test_what_is_missing_or_may_not_be_seen(
    client: Client, cluster: KubeServer, plural: str, name: str, what: str, level: str, said: str
) -> None:
    namespace = "" if plural == "namespaces" else "kubeflow"
    kept = cluster.objects.pop((plural, namespace, name))
    found = _lines(client, status=1 if level == "fail" else 0)[what]
    assert found.startswith(f"{level}: it does not exist")
    assert said in found
    cluster.objects[plural, namespace, name] = kept
    cluster.statuses[plural] = 403
    assert _lines(client, status=0)[what].startswith("warn: Cannot look at ")


def test_a_launcher_that_looks_for_keys_in_the_environment(
    client: Client, cluster: KubeServer
) -> None:
    what, keys = "config map kfp-launcher", {"secretName": "saev-storage"}
    for credentials, is_wrong in (
        ({"fromEnv": True}, True), ({"fromEnv": False, "secretRef": keys}, False), ({}, False),
    ):  # fmt: skip
        providers = {"s3": {"default": {"endpoint": "minio:9000", "credentials": credentials}}}
        for text in (yaml.safe_dump(providers), json.dumps(providers)):
            cluster.add("configmaps", "kfp-launcher", "kubeflow", data={"providers": text})
            found = _lines(client, "--no-pod", status=0)
            assert (what in found) == is_wrong
            assert not is_wrong or "warn: fromEnv is true, but the keys of saev-s" in found[what]
    del cluster.objects["secrets", "kubeflow", "saev-storage"]  # pods have a role
    data = {"providers": "s3: {default: {credentials: {fromEnv: true}}}"}
    cluster.add("configmaps", "kfp-launcher", "kubeflow", data=data)
    assert what not in _lines(client, "--no-pod", status=0)


def test_a_secret_without_its_keys(client: Client, cluster: KubeServer) -> None:
    cluster.objects["secrets", "kubeflow", "saev-storage"]["data"] = {"AWS_ACCESS_KEY_ID": "eA=="}
    found = _lines(client, status=1)["secret saev-storage"]
    assert "fail: it has no key AWS_SECRET_ACCESS_KEY" in found


# --- Permissions -------------------------------------------------------------------------------


def test_permissions_of_the_user(client: Client, cluster: KubeServer) -> None:
    cluster.denied = {"get pods/log", "delete pods"}
    found = _lines(client, status=1)
    assert "missing in kubeflow: get pods/log" in found["your permissions for logs"]
    assert "missing in kubeflow: delete pods" in found["your permissions for the doctor's pod"]


def test_permissions_of_the_service_account(client: Client, cluster: KubeServer) -> None:
    cluster.denied = {"patch workflowtaskresults", "get configmaps"}
    found = _lines(client, status=1)["service account saev-steps"]
    assert "it may not patch workflowtaskresults.argoproj.io, get configmaps/kfp-launcher" in found
    asked = [r["spec"] for r in cluster.reviews if r["spec"].get("user")]
    names = ("saev-steps", "saev-schedule")
    assert {spec["user"] for spec in asked} == {
        f"system:serviceaccount:kubeflow:{name}" for name in names
    }


def test_the_service_account_of_schedules(client: Client, cluster: KubeServer) -> None:
    """It has the steps' permissions, and must reach the storage as they do."""
    assert _lines(client, status=0)["service account saev-schedule"].startswith("ok: ")
    steps = cluster.objects["serviceaccounts", "kubeflow", "saev-steps"]
    steps["metadata"]["annotations"] = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/saev"}
    found = _lines(client, status=1)["storage access of saev-schedule"]
    assert "saev-steps has the annotation eks.amazonaws.com/role-arn" in found
    assert "`kubectl annotate serviceaccount -n kubeflow saev-schedule eks.amazonaws.com/" in found


def test_forwarding_needs_permissions_too(
    client: Client, cluster: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KFP_ENDPOINT")
    found = _lines(client, status=0)
    assert found["your permissions for forwarding a port to KFP"] == "ok: all 3 in kubeflow"
    assert "service/ml-pipeline in namespace kubeflow" in found["Kubeflow Pipelines API"]


def test_a_shared_kfp_asks_kubernetes_about_its_users(
    client: Client, kube: KubeServer, shared_kfp: KfpServer
) -> None:
    kube.add("namespaces", "team-a")
    kube.denied = {"create runs"}
    found = _lines(client, "--no-pod", "--namespace", "team-a", status=1)
    assert "create runs.pipelines.kubeflow.org" in found["your permissions for submitting"]


def test_a_namespace_that_a_single_user_kfp_does_not_use(
    client: Client, cluster: KubeServer
) -> None:
    found = _lines(client, "--no-pod", "--namespace", "team-a", status=0)
    assert "this KFP is single-user and runs them in kubeflow" in found["namespace team-a"]
    assert found["namespace kubeflow"].startswith("ok")


# --- GPUs --------------------------------------------------------------------------------------


def test_gpus_all_in_use(client: Client, cluster: KubeServer) -> None:
    _gpu_pod(cluster, "more", "a", 1)
    _gpu_pod(cluster, "all", "b", 4)
    found = _lines(client, status=0)["GPUs"]
    assert found == f"warn: 8 {GPU} on 2 nodes, 0 free Runs wait until some are free."


def test_gpus_of_another_name(client: Client, cluster: KubeServer) -> None:
    for name in ("a", "b"):
        cluster.objects["nodes", "", name]["status"]["allocatable"] = {"nvidia.com/mig-1g.5gb": "7"}
    found = _lines(client, status=1)["GPUs"]
    assert f"fail: none of 3 nodes has {GPU}" in found
    assert "The cluster has nvidia.com/mig-1g.5gb: set gpu_type" in found


def test_no_gpus(client: Client, cluster: KubeServer, home: Path) -> None:
    for name in ("a", "b"):
        del cluster.objects["nodes", "", name]
    assert "or set gpu_count to 0" in _lines(client, status=1)["GPUs"]
    home.joinpath("cluster.toml").write_text("[parameters]\ngpu_count = 0\n")
    assert _lines(client, status=0)["GPUs"].startswith("skip")


@pytest.mark.parametrize(
    ("parameters", "level", "said"),
    [
        ("gpu_count = 4", "ok", "5 free"),
        ("gpu_count = 5", "fail", "no node has the 5 that a pod of a run asks for"),
        ("gpu_count = 1\ntrain_gpus = 5", "fail", "Set gpu_count and train_gpus to 4 or less"),
        ("tolerations = []", "fail", "taint nvidia.com/gpu=present:NoSchedule is not tolerated"),
        ('tolerations = [{operator = "Exists"}]', "ok", "5 free"),
        (f'tolerations = [{{key = "{GPU}", value = "present"}}]', "ok", "5 free"),
        (f'tolerations = [{{key = "{GPU}", value = "other"}}]', "fail", "is not tolerated"),
        ('node_selector = {disk = "ssd"}', "fail", "node_selector disk=ssd does not match"),
    ],
)
def test_gpus_that_a_run_can_have(
    client: Client, cluster: KubeServer, home: Path, parameters: str, level: str, said: str
) -> None:
    home.joinpath("cluster.toml").write_text(f"[parameters]\n{parameters}\n")
    found = _lines(client, status=int(level == "fail"))["GPUs"]
    assert found.startswith(level)
    assert said in found


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ('gpu_count = "two"', "gpu_count (cluster.toml [parameters]) is 'two', expected a whole"),
        ("gpu_count = [1]", "gpu_count (cluster.toml [parameters]) is [1], expected a text"),
        ("node_selector = 'gpu'", "node_selector (cluster.toml [parameters]) is 'gpu', expected a"),
        ("node_selector = {gpu = 1}", "expected labels with texts as values"),
        (
            "tolerations = 'all'",
            "tolerations (cluster.toml [parameters]) is 'all', expected a JSON",
        ),
        ("tolerations = '{}'", "expected a JSON list"),
        ('tolerations = [{keys = "gpu"}]', "expected a list of objects with the keys key, op"),
        ('tolerations = [{operator = "exists"}]', "expected a list of objects with the keys"),
        ("gpu_counts = 2", "no parameter 'gpu_counts'"),
    ],
)
def test_parameters_that_submit_would_refuse(
    client: Client, cluster: KubeServer, home: Path, parameters: str, said: str
) -> None:
    home.joinpath("cluster.toml").write_text(f"[parameters]\n{parameters}\n")
    lines = _lines(client, status=1)
    assert lines["parameters"].startswith("fail")
    assert said in lines["parameters"]
    assert lines["GPUs"].startswith("skip")


def test_parameters_as_json_texts(client: Client, cluster: KubeServer, home: Path) -> None:
    text = """[parameters]
node_selector = '{"disk": "ssd"}'
gpu_count = "2"
tolerations = '[{"operator": "Exists"}]'
"""
    home.joinpath("cluster.toml").write_text(text)
    lines = _lines(client, status=1)
    assert lines["parameters"] == "ok: node_selector, gpu_count, tolerations"
    assert "node_selector disk=ssd does not match" in lines["GPUs"]


def test_gpus_that_are_shared(client: Client, cluster: KubeServer) -> None:
    labels = {"nvidia.com/gpu.sharing-strategy": "time-slicing"}
    cluster.objects["nodes", "", "a"]["metadata"]["labels"] = labels
    assert "each shared by time-slicing" in _lines(client, status=0)["GPUs"]


def test_nodes_that_may_not_be_seen(client: Client, cluster: KubeServer) -> None:
    cluster.statuses["nodes"] = 403
    assert _lines(client, status=0)["GPUs"].startswith("warn: Cannot list the nodes")


# --- Retries -----------------------------------------------------------------------------------

RETRIES = "retries in a new pod"


def test_what_is_retried_by_kfp_2_17(client: Client, cluster: KubeServer) -> None:
    found = _lines(client, status=0)[RETRIES]
    assert "policy OnError (workflow-controller-configmap): pods that are deleted" in found
    assert "Not: steps that end with an error, are killed or run out of memory" in found


@pytest.mark.parametrize("data", [{}, {"config": "parallelism: 4"}, {"workflowDefaults": "{}"}])
def test_what_is_retried_without_a_policy(
    client: Client, cluster: KubeServer, data: dict[str, str]
) -> None:
    cluster.objects["configmaps", "kubeflow", "workflow-controller-configmap"]["data"] = data
    found = _lines(client, status=0)[RETRIES]
    assert "policy OnFailure (Argo's default): steps that end with an error" in found
    assert "Not: pods that are deleted" in found


def test_nothing_is_retried_where_nobody_says_so(
    client: Client, cluster: KubeServer, home: Path
) -> None:
    """KFP 2.17 has a default for steps without a policy of their own; Argo has none."""
    home.joinpath("cluster.toml").write_text("[compile]\nretries = 0\n")
    assert "policy OnError" in _lines(client, status=0)[RETRIES]
    cluster.objects["configmaps", "kubeflow", "workflow-controller-configmap"]["data"] = {}
    assert _lines(client, status=0)[RETRIES].startswith("ok: none: retries = 0")


def test_an_administrator_may_have_patched_it(client: Client, cluster: KubeServer) -> None:
    deployment = cluster.objects["deployments", "kubeflow", "ml-pipeline"]
    patch = '{"templateDefaults":{"retryStrategy":{"limit":"2","retryPolicy":"Always"}}}'
    environment = [{"name": "COMPILED_PIPELINE_SPEC_PATCH", "value": patch}]
    deployment["spec"]["template"]["spec"]["containers"][0]["env"] = environment
    found = _lines(client, status=0)[RETRIES]
    assert found.startswith("warn: policy Always (COMPILED_PIPELINE_SPEC_PATCH of deployment")
    assert "Whole loops are retried as well" in found
    environment[0]["value"] = "{"
    assert "cannot be read" in _lines(client, status=0)[RETRIES]


def test_settings_under_one_key(client: Client, cluster: KubeServer) -> None:
    text = kube_server.CONTROLLER["workflowDefaults"].replace("\n", "\n  ")
    data = {"config": f"workflowDefaults:{text}"}
    cluster.objects["configmaps", "kubeflow", "workflow-controller-configmap"]["data"] = data
    assert "policy OnError" in _lines(client, status=0)[RETRIES]


def test_settings_that_may_not_be_read(client: Client, cluster: KubeServer) -> None:
    cluster.statuses["deployments"] = 403
    found = _lines(client, status=0)[RETRIES]
    assert found.startswith("warn: Cannot read COMPILED_PIPELINE_SPEC_PATCH")
    assert "As KFP 2.17.1 is installed, Argo runs again pods that are deleted" in found
    pod = cluster.objects["pods", "kubeflow", "ml-pipeline-0"]
    pod["spec"]["containers"][0]["image"] = "ghcr.test/kfp-api-server:2.16.0"
    assert "Argo runs again steps that end with an error" in _lines(client, status=0)[RETRIES]


# --- The pod -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "what", "said"),
    [
        (
            _status("Pending", waiting={"reason": "ImagePullBackOff", "message": "not found"}),
            "image",
            "did not start: main: ImagePullBackOff not found Check SAEV_IMAGE",
        ),
        (
            _status("Failed", terminated={"exitCode": 1, "reason": "Error"}),
            "storage, with the pods' credentials",
            "Cannot write s3://bucket/saev: permission denied.",
        ),
    ],
)
def test_a_pod_that_fails(
    client: Client, cluster: KubeServer, status: dict, what: str, said: str
) -> None:
    cluster.pod_statuses = [{"phase": "Pending"}, status]
    cluster.pod_log = "saev: error: Cannot write s3://bucket/saev: permission denied.\n"
    found = _lines(client, status=1)[what]
    assert found.startswith("fail")
    assert said in found
    assert cluster.deleted == [cluster.created[0]["metadata"]["name"]]


def test_a_pod_that_never_starts(
    client: Client, cluster: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "WAIT_SECONDS", 1)
    cluster.pod_statuses = [{"phase": "Pending"}]
    assert "still Pending after 1 s" in _lines(client, status=1)["image"]
    assert len(cluster.deleted) == 1


def test_a_missing_account_is_no_missing_permission(client: Client, cluster: KubeServer) -> None:
    """Kubernetes answers 403 to it."""
    del cluster.objects["serviceaccounts", "kubeflow", "saev-steps"]
    found = _lines(client, status=1)["pod"]
    assert "service account saev-steps does not exist in kubeflow `make install" in found
    assert "403" not in found
    assert "permission" not in found


def test_a_pod_that_is_refused(client: Client, cluster: KubeServer) -> None:
    cluster.statuses["pods"] = 403
    assert "Cannot start a pod in namespace kubeflow" in _lines(client, status=1)["pod"]


# --- Neither -----------------------------------------------------------------------------------


def test_without_kubernetes_an_endpoint_is_still_checked(client: Client, kfp: KfpServer) -> None:
    found = _lines(client, status=0)
    assert found["Kubernetes API"].startswith("warn: There is no kubeconfig")
    assert found["Kubeflow Pipelines API"].startswith("ok")
    assert found["cluster"].startswith("skip")


def test_without_anything(client: Client, home: Path) -> None:
    found = _lines(client, status=1)
    assert found["Kubernetes API"].startswith("fail: There is no kubeconfig")
    assert found["Kubeflow Pipelines API"].startswith("skip")


def test_a_kfp_that_refuses_does_not_end_the_checks(
    client: Client, cluster: KubeServer, kfp: KfpServer
) -> None:
    kfp.fail("/healthz", 401)
    found = _lines(client, status=1)
    assert found["Kubeflow Pipelines API"].startswith("fail: Cannot connect")
    assert found["GPUs"].startswith("ok")


def test_another_version_is_told(client: Client, cluster: KubeServer) -> None:
    pod = cluster.objects["pods", "kubeflow", "ml-pipeline-0"]
    pod["spec"]["containers"][0]["image"] = "ghcr.test/kfp-api-server:2.5.0@sha256:abc"
    found = _lines(client, status=0)["Kubeflow Pipelines API"]
    assert found.startswith("warn")
    assert "version 2.5.0" in found


def test_the_test_servers_schemas_can_fail() -> None:
    """A pod that Kubernetes would refuse is a violation."""
    state = kube_server.KubeServer()
    handler = object.__new__(kube_server._Handler)
    handler.state, handler.path = state, "/"
    handler._validate({"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": {"image": 1}})
    assert state.violations


# --- Several machines ----------------------------------------------------------------------------

TRAINER = "trainer.kubeflow.org/v1alpha1"


@pytest.fixture
def trainer(cluster: KubeServer, home: Path) -> KubeServer:
    """A cluster with all that two machines need; tests/e2e has the same with the real Trainer."""
    home.joinpath("cluster.toml").write_text("[parameters]\ntrain_nodes = 2\n")
    properties = {"spec": {"type": "object", "properties": {"runtimePatches": {"type": "array"}}}}
    name = "org.kubeflow.trainer.v1alpha1.TrainJob"
    cluster.schemas[TRAINER] = {name: {"properties": properties}}
    cluster.add("trainingruntimes", "saev-train", "kubeflow", spec={})
    version = {"kubeflow_trainer_version": "v2.3.0"}
    cluster.add("configmaps", "kubeflow-trainer-public", "kubeflow-system", data=version)
    return cluster


def test_several_machines(client: Client, trainer: KubeServer) -> None:
    found = _lines(client, status=0)
    assert found["Kubeflow Trainer"] == "ok: version 2.3.0"
    assert found["training runtime saev-train"] == "ok: it exists in kubeflow"
    assert found["service account saev-steps and TrainJobs"].startswith("ok: it may do all 8")


def no_trainer(server: KubeServer) -> None:
    del server.schemas[TRAINER]


def old_trainer(server: KubeServer) -> None:
    server.schemas[TRAINER]["org.kubeflow.trainer.v1alpha1.TrainJob"]["properties"] = {"spec": {}}


def no_runtime(server: KubeServer) -> None:
    del server.objects["trainingruntimes", "kubeflow", "saev-train"]


def no_right(server: KubeServer) -> None:
    server.denied = {"create trainjobs"}


@pytest.mark.parametrize(
    ("change", "what", "said"),
    [
        (no_trainer, "Kubeflow Trainer", "the cluster has none, as it does not serve"),
        (old_trainer, "Kubeflow Trainer", "too old: its TrainJobs have no runtimePatches"),
        (no_runtime, "training runtime saev-train", "it does not exist in kubeflow"),
        (no_right, "service account saev-steps and TrainJobs", "may not create trainjobs.trainer"),
    ],
)
def test_what_several_machines_lack(
    client: Client,
    kfp: KfpServer,
    trainer: KubeServer,
    change: Callable[[KubeServer], None],
    what: str,
    said: str,
) -> None:
    """The doctor says it, and nothing is submitted."""
    change(trainer)
    found = _lines(client, status=1)
    assert found[what].startswith("fail: ")
    assert said in found[what]
    assert "or set train_nodes to 1" in found[what]
    submit = ("submit", "--dataset", "s3://bucket/pets", "--config", "config.toml", "--no-check")
    refused = client.fails(*submit)
    assert refused.startswith(f"train_nodes is 2, but {what}: ")
    assert said in refused
    assert kfp.runs == []
    client.ok(*submit, "--param", "train_nodes=1")


def test_a_volume_of_one_node(client: Client, trainer: KubeServer, home: Path) -> None:
    text = 'storage = "pvc"\nroot = "/data/saev"\n[parameters]\ntrain_nodes = 2\n'
    home.joinpath("cluster.toml").write_text(text)
    for modes, level in ((["ReadWriteOnce"], "fail"), (["ReadWriteMany"], "ok")):
        spec = {"accessModes": modes, "storageClassName": ""}
        status = {"phase": "Bound", "capacity": {"storage": "1Ti"}}
        trainer.add("persistentvolumeclaims", "saev-data", "kubeflow", spec=spec, status=status)
        found = _lines(client, "--no-pod", status=int(level == "fail"))
        assert found["volume claim saev-data on several machines"].startswith(f"{level}: ")


@pytest.mark.parametrize("value", ["0", "two", "1.5"])
def test_a_wrong_number_of_machines(client: Client, cluster: KubeServer, value: str) -> None:
    submit = ("submit", "--dataset", "s3://bucket/pets", "--config", "config.toml", "--no-check")
    said = client.fails(*submit, "--param", f"train_nodes={value}")
    assert "expected a whole number of machines, at least 1" in said
