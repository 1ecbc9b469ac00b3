"""Starts pods like those of steps to try images and storage. They are always deleted."""

import collections.abc
import contextlib
import re
import secrets
import time
import typing as tp

from pipelines import logs
from pipelines.doctor.findings import Finding, fail, ok, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.options import PodOptions
from pipelines.settings import Settings
from saev.launch.pods import SUPERVISOR, Json, PodParameters, PodSettings, template

POLL_SECONDS = 1.0
WAIT_SECONDS = 600
"""Most seconds until a pod has run. Most of them may be needed to pull the image."""
_HOPELESS = frozenset(
    {
        "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
        "CreateContainerError", "RunContainerError",
    }
)  # fmt: skip
"""Reasons for waiting that do not pass by themselves."""
_STORAGE = "storage, with the pods' credentials"
_NO_ACCOUNT = re.compile(r"service ?account\b.*not found", re.IGNORECASE)


class Trial(tp.NamedTuple):
    """One pod and what it tries."""

    what: str
    """What is tried, for people."""
    image: str
    command: tuple[str, ...]
    has_storage: bool
    """Whether the command also tries the storage."""


def trials(settings: Settings, dataset: str) -> list[Trial]:
    """The trials: the small image with the storage, and the runtime image if it is another one."""
    check: tuple[str, ...] = ("python", "-m", "saev", "step", "check", "--root", settings.root)
    check += ("--dataset", dataset) if dataset else ()
    if settings.cpu_image in ("", settings.image):
        return [Trial("image", settings.image, check, True)]
    start = ("python", "-c", "import saev, torch")
    return [
        Trial("small image", settings.cpu_image, check, True),
        Trial("runtime image", settings.image, start, False),
    ]


def run(
    kube: Kube, namespace: str, options: PodOptions, dataset: str
) -> collections.abc.Iterator[Finding]:
    """Start the pods side by side, wait for them, and report what they found.

    Args:
        kube: the connection.
        namespace: where runs live.
        options: how the pods of runs are made.
        dataset: URL of a dataset to list, or "".
    """
    made: dict[str, Trial] = {}
    left: list[Finding] = []
    try:  # a signal may come after the pod is made and before the answer arrives
        for trial in trials(kube.settings, dataset):
            body = manifest(kube.settings, options, trial)
            name = body["metadata"]["name"]
            made[name] = trial
            try:
                with kube.explained(f"start a pod in namespace {namespace}"):
                    kube.core.create_namespaced_pod(namespace, body)
            except ClusterError as err:
                if 400 <= err.status < 500:  # it was not made
                    del made[name]
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
    """The finding for a pod that Kubernetes refuses. A missing account also gives status 403."""
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
            return warn("pod", f"{name} could not be deleted: {err}", remedy)
    return None


def _wait(kube: Kube, namespace: str, name: str) -> tp.Any:
    """Wait until the pod has ended, cannot start, or takes too long. Returns the pod."""
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
    # The supervisor's own last line repeats the step's error, and adds advice about runs.
    errors = [line for line in said if "saev: error:" in line]
    errors = errors or [line for line in said if "error:" in line.lower()]
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


def manifest(settings: Settings, options: PodOptions, trial: Trial) -> Json:
    """The pod of a trial: a step's pod, and so with its account, storage and restrictions.

    Args:
        settings: the cluster.
        options: how the pods of runs are made.
        trial: what the pod runs.
    """
    pod = template(
        PodSettings(
            **{name: getattr(options, name) for name in PodParameters.model_fields},
            step="doctor",
            image=trial.image,
            is_small=True,
            mounts_volume=settings.storage == "pvc",
            timeout_seconds=WAIT_SECONDS,
            retries=0,
        ),
        [*SUPERVISOR, "--", *trial.command],
        run_id="",
        service_account=settings.service_account,
    )
    pod["metadata"]["name"] = f"saev-doctor-{secrets.token_hex(4)}"
    return {"apiVersion": "v1", "kind": "Pod", **pod}
