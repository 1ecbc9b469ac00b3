"""A launched pod against the one that the compiled pipeline asks KFP for."""

import json
import typing as tp

import pytest
import yaml
from compiling import compile_pipeline

from pipelines.options import CompileOptions, PodOptions
from saev.launch import pods

Json = dict[str, tp.Any]

VALUES: Json = {
    "gpu_type": "nvidia.com/mig-1g.10gb", "gpu_count": "2", "train_gpus": "4", "cpu": "6",
    "memory": "48Gi", "node_selector": {"gpu": "a100"},
    "tolerations": [
        {"key": "gpu", "operator": "Equal", "value": "a100", "effect": "NoExecute",
         "tolerationSeconds": 60},
        {"key": "spot", "operator": "Exists", "effect": "NoSchedule"},
    ],
    "storage_secret": "keys", "config_map": "env", "pvc_name": "claim", "image_pull_secret": "pull",
}  # fmt: skip
"""How pods are made, none of it at its default."""
HOURS = {"extract": 5.0, "train": 6.0, "infer": 7.0, "summarise": 8.0}
STEPS = list(HOURS)


def constant(raw: Json) -> tp.Any:
    return raw["runtimeValue"]["constant"]


def kfps_pod(text: str, step: str) -> Json:
    """The part of the pod that the compiled pipeline decides, as KFP's driver makes it.

    After backend/src/v2/driver/k8s.go and driver.go of KFP 2.17.
    """
    spec, platforms = yaml.load_all(text, yaml.CSafeLoader)
    container = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    more = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
    asked = container["resources"]
    resources: dict[str, dict[str, str]] = {}
    for key, (kind, name) in {
        "resourceCpuRequest": ("requests", "cpu"), "resourceCpuLimit": ("limits", "cpu"),
        "resourceMemoryRequest": ("requests", "memory"),
        "resourceMemoryLimit": ("limits", "memory"),
    }.items():  # fmt: skip
        if key in asked:
            resources.setdefault(kind, {})[name] = asked[key]
    if "accelerator" in asked:
        accelerator = asked["accelerator"]
        resources["limits"][accelerator["resourceType"]] = accelerator["resourceCount"]
    volumes = {}
    for one in more["emptyDirMounts"]:
        source = {"medium": one.get("medium"), "sizeLimit": one.get("sizeLimit")}
        volumes[one["mountPath"]] = {"emptyDir": {k: v for k, v in source.items() if v}}
    for one in more["secretAsVolume"]:
        secret = {"secretName": constant(one["secretNameParameter"]), "optional": one["optional"]}
        volumes[one["mountPath"]] = {"secret": secret}
    for one in more["configMapAsVolume"]:
        config = {"name": constant(one["configMapNameParameter"]), "optional": one["optional"]}
        volumes[one["mountPath"]] = {"configMap": config}
    for one in more.get("pvcMount", []):
        claim = {"claimName": constant(one["pvcNameParameter"])}
        volumes[one["mountPath"]] = {"persistentVolumeClaim": claim}
    tolerations = [
        {key: int(value) if key == "tolerationSeconds" else value for key, value in one.items()}
        for one in more.get("tolerations", [])
    ]
    return {
        "image": container["image"],
        "command": [*container["command"], *container["args"]],
        "resources": resources,
        "env": container["env"],
        "volumes": volumes,
        "labels": more["podMetadata"]["labels"],
        "nodeSelector": more.get("nodeSelector", {}).get("labels", {}),
        "tolerations": tolerations,
        "imagePullSecrets": [
            {"name": constant(one["secretNameParameter"])} for one in more["imagePullSecret"]
        ],
        "activeDeadlineSeconds": int(more["activeDeadlineSeconds"]),
        "runAsNonRoot": more["securityContext"]["runAsNonRoot"],
    }


def launched_pod(template: Json) -> Json:
    """The same part of ours."""
    spec = template["spec"]
    (container,) = spec["containers"]
    sources = {volume.pop("name"): volume for volume in json.loads(json.dumps(spec["volumes"]))}
    return {
        "image": container["image"],
        "command": container["command"],
        "resources": container["resources"],
        "env": container["env"],
        "volumes": {m["mountPath"]: sources[m["name"]] for m in container["volumeMounts"]},
        "labels": {k: v for k, v in template["metadata"]["labels"].items() if k != pods.RUN_LABEL},
        "nodeSelector": spec.get("nodeSelector", {}),
        "tolerations": spec.get("tolerations", []),
        "imagePullSecrets": spec["imagePullSecrets"],
        "activeDeadlineSeconds": spec["activeDeadlineSeconds"],
        "runAsNonRoot": container["securityContext"]["runAsNonRoot"],
    }


class Case(tp.NamedTuple):
    """A way to compile the pipeline, and what comes of it."""

    loop: str
    """With loops."""
    job: str
    """With launch = job."""


@pytest.fixture(scope="module", params=["GPUs on objects", "CPUs on a volume"])
def case(request: pytest.FixtureRequest) -> Case:
    options = CompileOptions(
        image="example.org/saev:1", cpu_image="example.org/saev-cpu:1", retries=2, shm_size="3Gi",
        timeout_hours=HOURS, pods=PodOptions.of(VALUES), parallelism=3,
    )  # fmt: skip
    if request.param == "CPUs on a volume":
        on_cpus = PodOptions.of({**VALUES, "gpu_count": "0", "train_gpus": "0"})
        options = options.model_copy(update={"storage": "pvc", "pods": on_cpus})
    launching = options.model_copy(update={"launch": "job"})
    return Case(compile_pipeline("saev", options).text, compile_pipeline("saev", launching).text)


def launching(text: str, step: str) -> dict[str, str]:
    """The flags of a step that launches another one."""
    spec = next(yaml.load_all(text, yaml.CSafeLoader))
    container = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    assert container["command"][-2:] == ["step", "launch"]
    return dict(zip(container["args"][::2], container["args"][1::2], strict=True))


@pytest.mark.parametrize("step", STEPS)
def test_a_launched_pod_is_as_kfps(case: Case, step: str) -> None:
    wanted = kfps_pod(case.loop, step)
    flags = launching(case.job, step)
    assert (flags["--step"], flags["--parallelism"]) == (step, "3")
    settings = pods.PodSettings.from_dict(json.loads(flags["--pods"]), source="--pods")
    made = launched_pod(pods.template(settings, wanted["command"], "run", "saev-steps"))
    assert made == wanted


@pytest.mark.parametrize("step", STEPS)
def test_who_launches_needs_little_and_has_time(case: Case, step: str) -> None:
    """Its pods may wait for nodes, or in a queue."""
    spec, platforms = yaml.load_all(case.job, yaml.CSafeLoader)
    container = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    more = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
    assert container["image"] == "example.org/saev-cpu:1"
    assert "accelerator" not in container["resources"]
    assert "activeDeadlineSeconds" not in more
    (task,) = (
        dag["dag"]["tasks"][step]
        for dag in spec["components"].values()
        if step in dag.get("dag", {}).get("tasks", {})
    )
    assert int(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s")) > 365 * 86400
    assert "iterator" not in json.dumps(spec).lower()
