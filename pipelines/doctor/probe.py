"""Pods like those of steps that try images and storage, and are deleted whatever happens."""

import collections.abc
import contextlib
import re
import secrets
import time
import typing as tp

from kubernetes import client

from pipelines import logs
from pipelines.doctor.findings import Finding, fail, ok, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.options import PodOptions
from pipelines.settings import Settings
from saev.config.environment import CONFIG_ENV, SECRET_ENV
from saev.launch.pods import DATA_MOUNT, LABELS

POLL_SECONDS = 1.0
WAIT_SECONDS = 600
"""Seconds until a pod must have run; pulling the image may take most of it."""
_HOPELESS = frozenset(
    {
        "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
        "CreateContainerError", "RunContainerError",
    }
)  # fmt: skip
"""Reasons for waiting that time does not mend."""
_STORAGE = "storage, with the pods' credentials"
_NO_ACCOUNT = re.compile(r"service ?account\b.*not found", re.IGNORECASE)


class Trial(tp.NamedTuple):
    """What one pod tries."""

    what: str
    """What is tried, for people."""
    image: str
    command: tuple[str, ...]
    has_storage: bool
    """Whether the command tries the storage, and not only the image."""


def trials(settings: Settings, dataset: str) -> list[Trial]:
    """The small image with the storage, and the runtime image, if that is another one."""
    check: tuple[str, ...] = ("python", "-m", "saev", "step", "check", "--root", settings.root)
    check += ("--dataset", dataset) if dataset else ()
    if settings.cpu_image in ("", settings.image):
        return [Trial("image", settings.image, check, True)]
    start = ("python", "-c", "import saev, torch")
    return [
        Trial("small image", settings.cpu_image, check, True),
        Trial("runtime image", settings.image, start, False),
    ]


def run(kube: Kube, namespace: str, dataset: str) -> collections.abc.Iterator[Finding]:
    """Start the pods side by side, wait for them, and tell what they found."""
    made: dict[str, Trial] = {}
    left: list[Finding] = []
    try:  # a signal may come after a pod is made, before the answer is there
        for trial in trials(kube.settings, dataset):
            body = manifest(kube, trial)
            made[body.metadata.name] = trial
            try:
                with kube.explained(f"start a pod in namespace {namespace}"):
                    kube.core.create_namespaced_pod(namespace, body)
            except ClusterError as err:
                if 400 <= err.status < 500:  # it was not made
                    del made[body.metadata.name]
                yield _refused(kube, namespace, str(err))
                return
        for name, trial in made.items():
            yield from _judge(kube, _wait(kube, namespace, name), trial)
    except ClusterError as err:
        yield warn("pod", str(err), "")
    finally:
        left = [found for name in made if (found := _delete(kube, namespace, name))]
    yield from left


def _refused(kube: Kube, namespace: str, said: str) -> Finding:
    """For a pod that Kubernetes does not take. It answers 403 to a missing account, too."""
    if _NO_ACCOUNT.search(said):
        return fail(
            "pod",
            f"not started: service account {kube.settings.service_account} does not exist in "
            f"{namespace}",
            f"`make install OVERLAY=… NAMESPACE={namespace}` makes it and its Role.",
        )
    return fail("pod", said, "A quota, or the Pod Security Standard, may refuse it.")


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


def _judge(kube: Kube, pod: tp.Any, trial: Trial) -> collections.abc.Iterator[Finding]:
    statuses = pod.status.container_statuses or []
    has_run = any(c.state and (c.state.terminated or c.state.running) for c in statuses)
    if not has_run:
        why = logs.reasons(pod) or f"still {pod.status.phase} after {WAIT_SECONDS} s"
        yield fail(trial.what, f"{trial.image} did not start: {why}", _remedy(why, trial))
        return
    said = _log(kube, pod)
    has_succeeded = pod.status.phase == "Succeeded"
    errors = [line for line in said if "error:" in line.lower()]
    error = (errors or said[-1:] or [logs.reasons(pod)])[-1].split("saev: error:", 1)[-1].strip()
    if not has_succeeded and not trial.has_storage:
        remedy = "Build it from this version, with `make image`, and push it."
        yield fail(trial.what, f"{trial.image} starts, but {error}", remedy)
        return
    yield ok(trial.what, f"{trial.image} starts")
    if not trial.has_storage:
        return
    if has_succeeded:
        steps = [line.rsplit("ok: ", 1)[-1] for line in said if "ok: " in line]
        yield ok(_STORAGE, f"{kube.settings.root}: {', '.join(steps) or 'works'}")
        return
    yield fail(
        _STORAGE,
        error,
        "Check the secret, the config map (AWS_ENDPOINT_URL) and the network policies "
        "(docs/cluster.md).",
    )


def _remedy(why: str, trial: Trial) -> str:
    if "Image" in why:
        variable = "SAEV_CPU_IMAGE" if trial.what == "small image" else "SAEV_IMAGE"
        return f"Check {variable}, that it is pushed, and image_pull_secret for private registries."
    if "nschedulable" in why:
        return "No node has room for it, or its volume cannot be mounted there."
    return "Pulling it may take longer: try again. `kubectl get events -n NAMESPACE` may say more."


def _log(kube: Kube, pod: tp.Any) -> list[str]:
    with contextlib.suppress(ClusterError), kube.explained("read the pod's log"):
        answer = kube.core.read_namespaced_pod_log(
            pod.metadata.name, pod.metadata.namespace, _preload_content=False
        )
        text = answer.data.decode("utf-8", "replace")
        return [line for line in map(str.strip, text.splitlines()) if line]
    return []


def manifest(kube: Kube, trial: Trial) -> client.V1Pod:
    """The pod: with a step's account, environment, mounts and restrictions."""
    settings = kube.settings
    names = {**PodOptions().model_dump(), **settings.parameters}
    env = [
        client.V1EnvVar(
            name=key,
            value_from=client.V1EnvVarSource(
                secret_key_ref=client.V1SecretKeySelector(
                    name=names["storage_secret"],
                    key=key,
                    optional=True,
                )
            ),
        )
        for key in SECRET_ENV
    ]
    env += [
        client.V1EnvVar(
            name=key,
            value_from=client.V1EnvVarSource(
                config_map_key_ref=client.V1ConfigMapKeySelector(
                    name=names["config_map"], key=key, optional=True
                )
            ),
        )
        for key in CONFIG_ENV
    ]
    volumes = [client.V1Volume(name="tmp", empty_dir=client.V1EmptyDirVolumeSource())]
    mounts = [client.V1VolumeMount(name="tmp", mount_path="/tmp")]
    if settings.storage == "pvc":
        claim = names["pvc_name"]
        source = client.V1PersistentVolumeClaimVolumeSource(claim_name=claim)
        volumes.append(client.V1Volume(name="data", persistent_volume_claim=source))
        mounts.append(client.V1VolumeMount(name="data", mount_path=DATA_MOUNT))
    container = client.V1Container(
        name=logs.MAIN,
        image=trial.image,
        command=list(trial.command),
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
            labels={**LABELS, logs.STEP_LABEL: "doctor"},
        ),
        spec=client.V1PodSpec(
            containers=[container],
            volumes=volumes,
            restart_policy="Never",
            active_deadline_seconds=WAIT_SECONDS,
            service_account_name=settings.service_account,
            image_pull_secrets=[client.V1LocalObjectReference(name=names["image_pull_secret"])],
            security_context=client.V1PodSecurityContext(
                run_as_non_root=True,
                seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
            ),
        ),
    )
