"""Translates a step's pod template into calls of kfp's SDK."""

import typing as tp

from kfp import kubernetes
from kfp.dsl import pipeline_task

from saev.config.environment import CONFIG_ENV, SECRET_ENV
from saev.launch.pods import PodSettings, template

Json = dict[str, tp.Any]

_QUANTITIES = {
    ("requests", "cpu"): pipeline_task.PipelineTask.set_cpu_request,
    ("requests", "memory"): pipeline_task.PipelineTask.set_memory_request,
    ("limits", "cpu"): pipeline_task.PipelineTask.set_cpu_limit,
    ("limits", "memory"): pipeline_task.PipelineTask.set_memory_limit,
}
_TOLERATION = {"tolerationSeconds": "toleration_seconds"}
"""Kubernetes' names of a toleration's keys → kfp's names."""


def apply_template(task: pipeline_task.PipelineTask, settings: PodSettings) -> None:
    """Give a task the pod of a step: the parts of its template that KFP does not decide itself.

    Args:
        task: a task of the pipeline that is compiled.
        settings: the settings of the step's pods.
    """
    pod = template(settings, (), run_id="", service_account="")
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    task.set_container_image(container["image"])
    _resources(task, container["resources"])
    for key, value in spec.get("nodeSelector", {}).items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in spec.get("tolerations", []):
        kubernetes.add_toleration(
            task, **{_TOLERATION.get(key, key): value for key, value in toleration.items()}
        )
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    are_files = _can_be_volumes(spec["volumes"])
    for volume in spec["volumes"]:
        _volume(task, volume, paths[volume["name"]], are_files)
    kubernetes.set_image_pull_secrets(task, [one["name"] for one in spec["imagePullSecrets"]])
    is_not_root = container["securityContext"]["runAsNonRoot"]
    kubernetes.set_security_context(task, run_as_non_root=is_not_root)
    for key, value in pod["metadata"]["labels"].items():
        kubernetes.add_pod_label(task, key, value)


def _resources(task: pipeline_task.PipelineTask, resources: Json) -> None:
    for kind, amounts in resources.items():
        for name, amount in amounts.items():
            if (kind, name) in _QUANTITIES:
                _QUANTITIES[kind, name](task, amount)
            else:
                task.set_accelerator_type(name).set_accelerator_limit(amount)


def _volume(task: pipeline_task.PipelineTask, volume: Json, path: str, are_files: bool) -> None:
    """Mount a volume. A Secret or ConfigMap may become environment variables instead."""
    match volume:
        case {"emptyDir": of}:
            kubernetes.empty_dir_mount(
                task, volume["name"], path, of.get("medium"), of.get("sizeLimit")
            )
        case {"secret": {"secretName": name}} if are_files:
            kubernetes.use_secret_as_volume(task, name, path, optional=True)
        case {"secret": {"secretName": name}}:
            keys = {key: key for key in SECRET_ENV}
            kubernetes.use_secret_as_env(task, name, keys, optional=True)
        case {"configMap": {"name": name}} if are_files:
            kubernetes.use_config_map_as_volume(task, name, path, optional=True)
        case {"configMap": {"name": name}}:
            keys = {key: key for key in CONFIG_ENV}
            kubernetes.use_config_map_as_env(task, name, keys, optional=True)
        case {"persistentVolumeClaim": {"claimName": name}}:
            kubernetes.mount_pvc(task, pvc_name=name, mount_path=path)
        case _:
            raise NotImplementedError(f"a volume of {sorted(volume)}")


def _can_be_volumes(volumes: tp.Sequence[Json]) -> bool:
    """Whether Secret and ConfigMap can be mounted as volumes.

    KFP gives the volume the object's name. The name of a volume has no dot and at most 63
    characters, and is unique in its pod.
    """
    names = [
        volume.get("secret", {}).get("secretName")
        or volume.get("configMap", {}).get("name")
        or volume.get("persistentVolumeClaim", {}).get("claimName")
        or volume["name"]
        for volume in volumes
    ]
    are_labels = all("." not in name and len(name) <= 63 for name in names)
    return are_labels and len(set(names)) == len(names)
