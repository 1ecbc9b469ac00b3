"""Logs of a run's pods, from Kubernetes.

Pods are found by labels: KFP labels every pod of a run, and the pipeline labels each step's. So it
needs neither the pod names that some versions of KFP leave out nor a guess at Argo's.
"""

import typing as tp

import rich.console

from pipelines import steps
from pipelines.connect import Kfp
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from saev.errors import ConfigError, SaevError

RUN_LABEL = "pipeline/runid"
STEP_LABEL = "app.kubernetes.io/component"
MAIN = "main"
"""Argo's name of the container that is the step itself."""
END_LINES = 30
"""Lines that are shown of a failed step."""


def show(kfp: Kfp, run: tp.Any, step: str, tail: int, console: rich.console.Console) -> None:
    """Print the logs of a run's pods, or of one step's, oldest first.

    Args:
        kfp: the connection.
        run: the run.
        step: name of the step; empty means all.
        tail: lines per pod; 0 means all.
        console: where to.

    Raises:
        ClusterError: Kubernetes refuses, or the run has no such pods any more.
        ConfigError: there is no such step, or no kubeconfig.
    """
    kube = Kube(kfp.settings)
    pods = _pods(kube, kfp.pods, run.run_id, step)
    if not pods:
        said = " ".join(f"KFP says: {text}." for text in steps.messages(run))
        raise ClusterError(
            f"Kubernetes has no pods of run {run.display_name}"
            f"{f', step {step}' if step else ''} in namespace {kfp.pods}: they have not been made, "
            f"or are deleted already. {said} {kfp.run_url(run.run_id)} shows what KFP kept."
        )
    for pod in pods:
        _print(kube, pod, tail, console)


def show_end(kfp: Kfp, run: tp.Any, step: str, console: rich.console.Console) -> None:
    """The last lines of the pod that failed, or else what KFP says. Raises nothing."""
    try:
        kube = Kube(kfp.settings)
        pods = _pods(kube, kfp.pods, run.run_id, step)
        failed = [pod for pod in pods if pod.status.phase == "Failed"] or pods
        if failed:
            _print(kube, failed[-1], END_LINES, console)
            return
        why = f"its pods are gone from namespace {kfp.pods}."
    except SaevError as err:
        why = str(err)
    said = steps.messages(run)
    for text in said:
        console.print(f"KFP says: {text}", highlight=False, markup=False, soft_wrap=True)
    if not said:
        text = f"No log of the failed step: {why}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _pods(kube: Kube, namespace: str, run_id: str, step: str) -> list[tp.Any]:
    """Pods of a run, oldest first. Without a step, those that are steps."""
    if step and step not in steps.STEPS and step not in steps.COMPONENTS.values():
        raise ConfigError(f"There is no step {step!r}; the steps are: {', '.join(steps.STEPS)}.")
    selector = f"{RUN_LABEL}={run_id},{STEP_LABEL}"
    if step:
        selector += f"={steps.COMPONENTS.get(step, step)}"
    with kube.explained(f"list the pods of the run in namespace {namespace}"):
        pods = kube.core.list_namespaced_pod(namespace, label_selector=selector).items
    return sorted(pods, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))


def _print(kube: Kube, pod: tp.Any, tail: int, console: rich.console.Console) -> None:
    name, step = pod.metadata.name, (pod.metadata.labels or {}).get(STEP_LABEL, "")
    console.rule(f"{step}  {name}  {pod.status.phase}", align="left", style="dim")
    why = reasons(pod)
    if why:
        console.print(why, highlight=False, markup=False, style="yellow", soft_wrap=True)
    options = {"tail_lines": tail} if tail else {}
    try:
        with kube.explained(f"read the log of pod {name}"):
            # Undecoded, since the library would turn JSON lines into Python.
            answer = kube.core.read_namespaced_pod_log(
                name, pod.metadata.namespace, container=MAIN, _preload_content=False, **options
            )
            text = answer.data.decode("utf-8", "replace")
    except ClusterError as err:
        if err.status not in (400, 404):  # its container has not started, or is gone
            raise
        text = "(no log yet)\n" if not why else ""
    console.print(text, end="", highlight=False, markup=False, soft_wrap=True)


def reasons(pod: tp.Any) -> str:
    """What Kubernetes says of a pod that does not run: unschedulable, image, memory, eviction."""
    found = [pod.status.message or pod.status.reason or ""]
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            found.append(f"{condition.reason}: {condition.message}")
    containers = (
        *(pod.status.init_container_statuses or []),
        *(pod.status.container_statuses or []),
    )
    for container in containers:
        waiting, ended = container.state.waiting, container.state.terminated
        if waiting and waiting.reason not in ("PodInitializing", "ContainerCreating"):
            found.append(f"{container.name}: {waiting.reason} {waiting.message or ''}".strip())
        if ended and ended.exit_code:
            status = f"exit status {ended.exit_code}"
            found.append(f"{container.name}: {ended.reason or 'Error'}, {status}")
    return "; ".join(text for text in found if text)
