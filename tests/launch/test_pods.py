"""A launched pod against the one that the compiled pipeline asks KFP for."""

import json
import re
import typing as tp

import pytest
import yaml

from pipelines.definition import compile_pipeline
from pipelines.options import CompileOptions
from saev.launch import pods

Json = dict[str, tp.Any]

VALUES: Json = {
    "gpu_type": "nvidia.com/mig-1g.10gb", "gpu_count": "2", "train_gpus": "4", "cpu": "6",
    "memory": "48Gi", "node_selector": {"gpu": "a100"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "storage_secret": "keys", "config_map": "env", "pvc_name": "claim", "image_pull_secret": "pull",
}  # fmt: skip
"""Parameters of a run, none of them at its default."""
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(?:pipelinechannel--)?([^']+)'\]\}\}")


def value_of(raw: tp.Any) -> tp.Any:
    """What a parameter of the platform's part is in a run."""
    if isinstance(raw, dict):
        if "constant" in raw.get("runtimeValue", {}):
            return raw["runtimeValue"]["constant"]
        return VALUES[raw["componentInputParameter"].removeprefix("pipelinechannel--")]
    found = _PLACEHOLDER.fullmatch(raw)
    return VALUES[found[1]] if found else raw


def kfps_pod(text: str, step: str) -> Json:
    """The part of the pod template that the compiled pipeline decides, as KFP's driver makes it.

    After backend/src/v2/driver/k8s.go and driver.go of KFP 2.17.
    """
    spec, platforms = yaml.safe_load_all(text)
    container = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    more = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
    asked = container["resources"]
    requests = {
        "cpu": value_of(asked["resourceCpuRequest"]),
        "memory": value_of(asked["resourceMemoryRequest"]),
    }
    limits = {
        "cpu": value_of(asked["resourceCpuLimit"]),
        "memory": value_of(asked["resourceMemoryLimit"]),
    }
    if "accelerator" in asked:  # KFP sets the request as well
        gpus = {
            value_of(asked["accelerator"]["resourceType"]): value_of(
                asked["accelerator"]["resourceCount"]
            )
        }
        requests |= gpus
        limits |= gpus
    environment = list(container.get("env", []))
    for kind, listed in (("secretKeyRef", "secretAsEnv"), ("configMapKeyRef", "configMapAsEnv")):
        for one in more.get(listed, []):
            name = value_of(one.get("secretNameParameter") or one["configMapNameParameter"])
            for pair in one["keyToEnv"]:
                key = pair.get("secretKey") or pair["configMapKey"]
                source = {"name": name, "key": key, "optional": one["optional"]}
                environment.append({"name": pair["envVar"], "valueFrom": {kind: source}})
    volumes, mounts = {}, {}
    for one in more.get("emptyDirMounts", []):
        source = {"medium": one.get("medium"), "sizeLimit": one.get("sizeLimit")}
        volumes[one["mountPath"]] = {"emptyDir": {k: v for k, v in source.items() if v}}
        mounts[one["volumeName"]] = one["mountPath"]
    for one in more.get("pvcMount", []):
        claim = {"claimName": value_of(one["pvcNameParameter"])}
        volumes[one["mountPath"]] = {"persistentVolumeClaim": claim}
    metadata = more["podMetadata"]
    return {
        "image": container["image"],
        "command": [*container["command"], *container["args"]],
        "resources": {"requests": requests, "limits": limits},
        "env": environment,
        "volumes": volumes,
        "labels": metadata["labels"],
        "nodeSelector": value_of(more["nodeSelector"]["nodeSelectorJson"])
        if "nodeSelector" in more
        else None,
        "tolerations": value_of(more["tolerations"][0]["tolerationJson"])
        if "tolerations" in more
        else None,
        "imagePullSecrets": [
            {"name": value_of(one["secretNameParameter"])} for one in more["imagePullSecret"]
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
        "nodeSelector": spec.get("nodeSelector"),
        "tolerations": spec.get("tolerations"),
        "imagePullSecrets": spec["imagePullSecrets"],
        "activeDeadlineSeconds": spec["activeDeadlineSeconds"],
        "runAsNonRoot": container["securityContext"]["runAsNonRoot"],
    }


HOURS = {"extract": 5.0, "train": 6.0, "infer": 7.0, "summarise": 8.0}


@pytest.fixture(scope="module", params=["object", "pvc"])
def options(request: pytest.FixtureRequest) -> CompileOptions:
    return CompileOptions(
        image="example.org/saev:1", cpu_image="example.org/saev-cpu:1", storage=request.param,
        retries=2, shm_size="3Gi", timeout_hours=HOURS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled(options: CompileOptions) -> str:
    return compile_pipeline("saev", options).text


@pytest.mark.parametrize(
    ("step", "gpus"), [("extract", 2), ("train", 4), ("infer", 2), ("summarise", None)]
)
def test_a_launched_pod_is_as_kfps(
    step: str, gpus: int | None, options: CompileOptions, compiled: str
) -> None:
    wanted = kfps_pod(compiled, step)
    settings = pods.PodSettings(
        step=step,
        image=options.image,
        gpus=gpus,
        timeout_seconds=options.timeout_seconds(step),
        retries=options.retries,
        shm_size=options.shm_size,
        **{key: VALUES[key] for key in VALUES if key not in ("gpu_count", "train_gpus")},
    )
    if options.storage == "object":
        settings = settings.model_copy(update={"pvc_name": ""})
    made = launched_pod(pods.template(settings, wanted["command"], "run", "saev-steps"))
    assert made == wanted
