"""Logs of a run's pods, from Kubernetes, or from KFP where they are gone.

Pods are found by labels: KFP labels every pod of a run, and the pipeline labels each step's. So it
needs neither the pod names that some versions of KFP leave out nor a guess at Argo's.
"""

import re
import typing as tp

import rich.console

from pipelines import archive, steps
from pipelines.connect import Kfp
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from saev.errors import ConfigError, SaevError
from saev.launch import trainjobs
from saev.launch.pods import MAIN, RUN_LABEL, STEP_LABEL

_KFP_LABEL = "pipelines.kubeflow.org/v2_component"
"""KFP's label of pods that it has started itself."""
END_LINES = 30
"""Lines that are shown of a failed step."""
_READ_LINES = 1000
"""Lines that are read for it: the launcher's are among them."""
_LAST_WORD = re.compile(r"saev: (?:(?:permanent )?error: (.*)|(passing error, tried .*))")
"""The line of saev, or of the supervisor above it, that says why a step ended."""
_LAUNCHER = re.compile(
    r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w.-]+\.go:\d+\] "  # KFP's launcher
    r"|time=\S+ level=\w+ msg=.*\bargo=true"  # Argo's executor, as text or JSON
    r"|\{.*\"argo\": ?true"
    r"|Error: exit status \d+$"
)
_MANY_TASKS = 100
"""KFP reads at most about 170 tasks of a run that is too large; small runs have fewer than this."""


def show(kfp: Kfp, run: tp.Any, step: str, tail: int, console: rich.console.Console) -> None:
    """Print the logs of a run's pods, or of one step's, oldest first; of pods that are gone, what
    KFP keeps.

    Args:
        kfp: the connection.
        run: the run.
        step: name of the step; empty means all.
        tail: lines per pod; 0 means all.
        console: where to.

    Raises:
        ClusterError: Kubernetes refuses, or there are no such logs any more.
        ConfigError: there is no such step, or no kubeconfig.
    """
    _check(step)
    try:
        kube = Kube(kfp.settings)
        pods = _pods(kube, kfp.pods, run.run_id, step)
    except SaevError as err:
        if not _show_kept(kfp, run, step, tail, console)[0]:
            raise err
        return
    for pod in pods:
        _print(kube, pod, tail, console)
    if pods:
        if not step:
            _say_first(first_error(kfp, run), console)
        return
    found, why = _show_kept(kfp, run, step, tail, console)
    if not found:
        said = " ".join(f"KFP says: {text}." for text in steps.messages(run))
        raise ClusterError(
            f"Kubernetes has no pods of run {run.display_name}"
            f"{f', step {step}' if step else ''} in namespace {kfp.pods}: they have not been made, "
            f"or are deleted already, as KFP does an hour after a run's end; {why}. {said} "
            f"{kfp.run_url(run.run_id)} shows what it has, under a step's Logs."
        )


def _show_kept(
    kfp: Kfp, run: tp.Any, step: str, tail: int, console: rich.console.Console
) -> tuple[bool, str]:
    """Print the logs that KFP keeps. Returns whether there were some, and else why not."""
    found, why = False, None
    failing, first = steps.failing(run), ""
    try:
        for kept in archive.logs(kfp, run, step):
            console.rule(f"{kept.step}  {kept.node}  kept by KFP", align="left", style="dim")
            text = "".join(kept.text.splitlines(keepends=True)[-tail:])
            console.print(text, end="", highlight=False, markup=False, soft_wrap=True)
            found = True
            if kept.step == failing and not first:
                first = error_of(without_launcher(kept.text))
    except ClusterError as err:
        why = err
    if first and not step:
        _say_first(f"{failing} failed first: {first}", console)
    return found, archive.reason(why)


def _say_first(text: str, console: rich.console.Console) -> None:
    """The first cause comes last, where people look. The exit handler's log is after it."""
    if text:
        console.rule(align="left", style="dim")
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def first_error(kfp: Kfp, run: tp.Any) -> str:
    """Which step failed first and why, in a line; empty if none did. Raises nothing."""
    step = steps.failing(run)
    if step not in (*steps.STEPS, *steps.EARLIER):
        return f"{step} failed, a pod of KFP's own." if step else ""
    try:
        kube = Kube(kfp.settings)
        pods = _pods(kube, kfp.pods, run.run_id, step)
        failed = [pod for pod in pods if pod.status.phase == "Failed"]
        said = error_of(without_launcher(_read(kube, failed[0], _READ_LINES))) if failed else ""
        why = said or (reasons(failed[0]) if failed else "")
    except SaevError:
        why = ""
    return f"{step} failed{' first' * (step != 'outcome')}: {why or 'its log says why.'}"


def show_end(kfp: Kfp, run: tp.Any, step: str, console: rich.console.Console) -> str:
    """The last lines of the pod that failed, or else what KFP says. Raises nothing.

    Returns:
        The step's error, in its own words; empty if it left none.
    """
    try:
        if step not in (*steps.STEPS, *steps.EARLIER):
            raise ClusterError(f"{step} is a pod of KFP's own; the UI shows its log.")
        kube = Kube(kfp.settings)
        pods = _pods(kube, kfp.pods, run.run_id, step)
        failed = [pod for pod in pods if pod.status.phase == "Failed"] or pods
        # A step that has launched others knows of all of them.
        failed = [pod for pod in failed if _KFP_LABEL in pod.metadata.labels] or failed
        if failed:
            _head(failed[-1], console)
            lines = without_launcher(_read(kube, failed[-1], _READ_LINES))
            text = "".join(lines[-END_LINES:])
            console.print(text, end="", highlight=False, markup=False, soft_wrap=True)
            return error_of(lines)
        why = f"its pods are gone from namespace {kfp.pods}."
    except SaevError as err:
        why = str(err)
    said = steps.messages(run)
    for text in said:
        console.print(f"KFP says: {text}", highlight=False, markup=False, soft_wrap=True)
    if not said:
        text = f"No log of the failed step: {why}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return ""


def without_launcher(text: str) -> list[str]:
    """Lines of a step's log that are the step's own: KFP's launcher and Argo write there too."""
    return [line for line in text.splitlines(keepends=True) if not _LAUNCHER.match(line)]


def error_of(lines: list[str]) -> str:
    """The error that a step ended with; empty if it left none, as when it was killed."""
    found = [match for line in lines if (match := _LAST_WORD.match(line))]
    return (found[-1][1] or found[-1][2]).strip() if found else ""


def ended_from_outside(kfp: Kfp, run: tp.Any, took: str) -> str:
    """What to say of a run that failed though no step did. Argo's own words are in its Workflow.

    Most often, the Workflow has outgrown what Kubernetes stores of one object (1 MiB, compressed).
    """
    n_tasks = len((run.run_details and run.run_details.task_details) or [])
    said = steps.messages(run)
    if argo := _workflow_message(kfp, run):
        why = f"Argo says: {argo}."
    elif said:
        why = f"KFP says: {said[0].rstrip('.')}."
    elif n_tasks >= _MANY_TASKS:
        why = "Most likely it had more loop iterations than one Workflow can hold, about 170."
    else:
        why = f"Nobody says why; {kfp.run_url(run.run_id)} may show more."
    return (
        f"was ended by Argo after {took}, though no step failed. {why} Its exit handler did not "
        "run, so its dataset stays claimed for a while; `make submit` takes it over. What is done "
        "is on storage and skipped. Of a run that is too large, submit less: a smaller n_parts, "
        "or a smaller sweep."
    )


def _workflow_message(kfp: Kfp, run: tp.Any) -> str:
    """What Argo wrote into the Workflow; empty if it is gone or may not be read."""
    try:
        kube = Kube(kfp.settings)
        with kube.explained("look at the run's Workflow"):
            found = kube.custom.list_namespaced_custom_object(
                "argoproj.io", "v1alpha1", kfp.pods, "workflows",
                label_selector=f"{RUN_LABEL}={run.run_id}",
            )["items"]  # fmt: skip
    except SaevError:
        return ""
    said = [str(item.get("status", {}).get("message") or "") for item in found]
    return " ".join(" ".join(said).split()).rstrip(".")[:300]


def _check(step: str) -> None:
    if step and step not in (*steps.STEPS, *steps.EARLIER):
        raise ConfigError(f"There is no step {step!r}; the steps are: {', '.join(steps.STEPS)}.")


def _pods(kube: Kube, namespace: str, run_id: str, step: str) -> list[tp.Any]:
    """Pods of a run, oldest first. Without a step, those that are steps."""
    selector = f"{RUN_LABEL}={run_id},{STEP_LABEL}"
    if step:
        selector += f"={'plan' if step in steps.EARLIER else step}"
    with kube.explained(f"list the pods of the run in namespace {namespace}"):
        pods = kube.core.list_namespaced_pod(namespace, label_selector=selector).items
    return sorted(pods, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))


def _print(kube: Kube, pod: tp.Any, tail: int, console: rich.console.Console) -> None:
    _head(pod, console)
    text = _read(kube, pod, tail) or ("" if reasons(pod) else "(no log yet)\n")
    console.print(text, end="", highlight=False, markup=False, soft_wrap=True)


def _head(pod: tp.Any, console: rich.console.Console) -> None:
    name, step = pod.metadata.name, (pod.metadata.labels or {}).get(STEP_LABEL, "")
    console.rule(f"{step}  {name}  {pod.status.phase}", align="left", style="dim")
    if why := reasons(pod):
        console.print(why, highlight=False, markup=False, style="yellow", soft_wrap=True)


def _read(kube: Kube, pod: tp.Any, tail: int) -> str:
    """The last lines of a pod's log; 0 is all. Empty if there is none."""
    name = pod.metadata.name
    options = {"tail_lines": tail} if tail else {}
    try:
        with kube.explained(f"read the log of pod {name}"):
            # Undecoded, since the library would turn JSON lines into Python.
            answer = kube.core.read_namespaced_pod_log(
                name,
                pod.metadata.namespace,
                container=_container(pod),
                _preload_content=False,
                **options,
            )
            return str(answer.data.decode("utf-8", "replace"))
    except ClusterError as err:
        if err.status not in (400, 404):  # its container has not started, or is gone
            raise
    return ""


def _container(pod: tp.Any) -> str:
    """Argo calls the step's container so, and Kubeflow Trainer otherwise."""
    names = [container.name for container in pod.spec.containers or []]
    return trainjobs.CONTAINER if trainjobs.CONTAINER in names else MAIN


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
