"""A pod like a step's that tries image and storage, and is deleted whatever happens."""

import collections.abc
import contextlib
import secrets
import time
import typing as tp

from kubernetes import client

from pipelines import definition, logs
from pipelines.errors import ClusterError
from pipelines.findings import Finding, fail, ok, warn
from pipelines.kube import Kube

POLL_SECONDS = 1.0
WAIT_SECONDS = 300
"""Seconds until the pod must have run; pulling the image may take most of it."""
_HOPELESS = frozenset(
    {
        "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
        "CreateContainerError", "RunContainerError",
    }
)  # fmt: skip
"""Reasons for waiting that time does not mend."""
_IMAGE, _STORAGE = "image", "storage, with the pods' credentials"


def run(kube: Kube, namespace: str, dataset: str) -> collections.abc.Iterator[Finding]:
    """Start the pod, wait for it, and tell what it found."""
    body = manifest(kube, dataset)
    name = body.metadata.name
    left, refused = None, False
    try:  # a signal may come after the pod is made, before the answer is there
        try:
            with kube.explained(f"start a pod in namespace {namespace}"):
                kube.core.create_namespaced_pod(namespace, body)
        except ClusterError as err:
            refused = 400 <= err.status < 500
            yield fail("pod", str(err), "A quota, or the Pod Security Standard, may refuse it.")
            return
        pod = _wait(kube, namespace, name)
        yield from _judge(kube, pod)
    except ClusterError as err:
        yield warn("pod", str(err), "")
    finally:
        left = None if refused else _delete(kube, namespace, name)
    if left:
        yield left


def _delete(kube: Kube, namespace: str, name: str) -> Finding | None:
    try:
        with kube.explained(f"delete pod {name}"):
            kube.core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)
    except ClusterError as err:
        if err.status != 404:
            remedy = f"`kubectl delete pod -n {namespace} {name}` removes it."
            return warn("pod", f"{name} is left behind: {err}", remedy)
    return None


def _wait(kube: Kube, namespace: str, name: str) -> tp.Any:
    """The pod when it is over, or hopeless, or out of time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with kube.explained(f"look at pod {name}"):
            pod = kube.core.read_namespaced_pod(name, namespace)
        if pod.status.phase in ("Succeeded", "Failed") or _waiting(pod) in _HOPELESS:
            return pod
        if time.monotonic() > deadline:
            return pod
        time.sleep(POLL_SECONDS)


def _waiting(pod: tp.Any) -> str:
    states = [c.state.waiting for c in pod.status.container_statuses or [] if c.state]
    return next((state.reason or "" for state in states if state), "")


def _judge(kube: Kube, pod: tp.Any) -> collections.abc.Iterator[Finding]:
    image = pod.spec.containers[0].image
    statuses = pod.status.container_statuses or []
    has_run = any(c.state and (c.state.terminated or c.state.running) for c in statuses)
    if not has_run:
        why = logs.reasons(pod) or f"still {pod.status.phase} after {WAIT_SECONDS} s"
        yield fail(_IMAGE, f"{image} did not start: {why}", _remedy(why))
        return
    yield ok(_IMAGE, f"{image} starts")
    said = _log(kube, pod)
    if pod.status.phase == "Succeeded":
        steps = [line.rsplit("ok: ", 1)[-1] for line in said if "ok: " in line]
        yield ok(_STORAGE, f"{kube.settings.root}: {', '.join(steps) or 'works'}")
        return
    errors = [line for line in said if "error:" in line] or said[-1:] or [logs.reasons(pod)]
    yield fail(
        _STORAGE,
        errors[-1].split("error:", 1)[-1].strip(),
        "Check the secret, the config map (AWS_ENDPOINT_URL) and the network policies "
        "(docs/cluster.md).",
    )


def _remedy(why: str) -> str:
    if "Image" in why:
        return (
            "Check SAEV_CPU_IMAGE, that it is pushed, and image_pull_secret for private registries."
        )
    if "nschedulable" in why:
        return "No node has room for it, or its volume cannot be mounted there."
    return "`kubectl get events -n NAMESPACE` may say more."


def _log(kube: Kube, pod: tp.Any) -> list[str]:
    with contextlib.suppress(ClusterError), kube.explained("read the pod's log"):
        answer = kube.core.read_namespaced_pod_log(
            pod.metadata.name, pod.metadata.namespace, _preload_content=False
        )
        text = answer.data.decode("utf-8", "replace")
        return [line for line in map(str.strip, text.splitlines()) if line]
    return []


def manifest(kube: Kube, dataset: str) -> client.V1Pod:
    """The pod: with a step's account, environment, mounts and restrictions."""
    settings = kube.settings
    names = settings.parameters
    env = [
        client.V1EnvVar(
            name=key,
            value_from=client.V1EnvVarSource(
                secret_key_ref=client.V1SecretKeySelector(
                    name=names.get("storage_secret", definition.STORAGE_SECRET),
                    key=key,
                    optional=True,
                )
            ),
        )
        for key in definition.SECRET_ENV
    ]
    env += [
        client.V1EnvVar(
            name=key,
            value_from=client.V1EnvVarSource(
                config_map_key_ref=client.V1ConfigMapKeySelector(
                    name=names.get("config_map", definition.CONFIG_MAP), key=key, optional=True
                )
            ),
        )
        for key in definition.CONFIG_ENV
    ]
    volumes = [client.V1Volume(name="tmp", empty_dir=client.V1EmptyDirVolumeSource())]
    mounts = [client.V1VolumeMount(name="tmp", mount_path="/tmp")]
    if settings.storage == "pvc":
        claim = names.get("pvc_name", definition.PVC_NAME)
        source = client.V1PersistentVolumeClaimVolumeSource(claim_name=claim)
        volumes.append(client.V1Volume(name="data", persistent_volume_claim=source))
        mounts.append(client.V1VolumeMount(name="data", mount_path=definition.DATA_MOUNT))
    command = ["python", "-m", "saev", "step", "check", "--root", settings.root]
    command += ["--dataset", dataset] if dataset else []
    container = client.V1Container(
        name=logs.MAIN,
        image=settings.cpu_image or settings.image,
        command=command,
        env=env,
        volume_mounts=mounts,
        resources=client.V1ResourceRequirements(
            requests={"cpu": "100m", "memory": "512Mi"}, limits={"cpu": "1", "memory": "2Gi"}
        ),
        security_context=client.V1SecurityContext(
            allow_privilege_escalation=False,
            capabilities=client.V1Capabilities(drop=["ALL"]),
            read_only_root_filesystem=True,
        ),
    )
    return client.V1Pod(
        api_version="v1",
        kind="Pod",
        metadata=client.V1ObjectMeta(
            name=f"saev-doctor-{secrets.token_hex(4)}",
            labels={**definition.LABELS, logs.STEP_LABEL: "doctor"},
        ),
        spec=client.V1PodSpec(
            containers=[container],
            volumes=volumes,
            restart_policy="Never",
            active_deadline_seconds=WAIT_SECONDS,
            service_account_name=settings.service_account,
            image_pull_secrets=[
                client.V1LocalObjectReference(
                    name=names.get("image_pull_secret", definition.IMAGE_PULL_SECRET)
                )
            ],
            security_context=client.V1PodSecurityContext(
                run_as_non_root=True,
                seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
            ),
        ),
    )
