"""Shows the logs of a run's pods: from Kubernetes, or from KFP if the pods are deleted.

Pods are found by labels: KFP labels every pod of a run, and the pipeline labels the pods of each
step. So no pod names are needed, which some versions of KFP do not tell.
"""

import re
import typing as tp

import rich.console

from pipelines import archive, called, steps
from pipelines.connect import Kfp
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from saev.errors import ConfigError, SaevError
from saev.launch import trainjobs
from saev.launch.pods import MAIN, RUN_LABEL, STEP_LABEL

_KFP_LABEL = "pipelines.kubeflow.org/v2_component"
"""KFP's label for pods that it started itself."""
END_LINES = 30
"""Number of lines that are shown of a failed step."""
_READ_LINES = 1000
"""Number of lines that are read for that. Lines of KFP's launcher are among them."""
_LAST_WORD = re.compile(r"saev: (?:(?:permanent )?error: (.*)|(passing error, tried .*))")
"""The line of saev, or of its supervisor, that says why a step ended."""
_LAUNCHER = re.compile(
    r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w.-]+\.go:\d+\] "  # KFP's launcher
    r"|time=\S+ level=\w+ msg=.*\bargo=true"  # Argo's executor, as text or JSON
    r"|\{.*\"argo\": ?true"
    r"|Error: exit status \d+$"
)
_MANY_TASKS = 100
"""A failed run with so many tasks was probably too large. KFP then reads about 170 tasks."""


def show(kfp: Kfp, run: tp.Any, step: str, tail: int, console: rich.console.Console) -> None:
    """Print the logs of a run's pods, oldest first. If the pods are deleted, print KFP's copies.

    Args:
        kfp: the connection.
        run: the run.
        step: name of the step; "" prints all steps.
        tail: lines of each pod; 0 prints all.
        console: receives the logs.

    Raises:
        ClusterError: Kubernetes refuses, or no log is left.
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
            f"{f', step {step}' if step else ''} in namespace {kfp.pods}: they are not made yet, "
            f"or KFP has deleted them, as it does an hour after a run's end; {why}. {said} "
            f"{kfp.run_url(run.run_id)} may show logs, under a step's Logs."
        )


def _show_kept(
    kfp: Kfp, run: tp.Any, step: str, tail: int, console: rich.console.Console
) -> tuple[bool, str]:
    """Print the logs that KFP keeps. Returns whether there were any, and the reason if not."""
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
    """Print the first cause of a failure at the end, because people look there first."""
    if text:
        console.rule(align="left", style="dim")
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def first_error(kfp: Kfp, run: tp.Any) -> str:
    """One line with the step that failed first, and the reason; "" if none failed.

    Errors of the connection are not raised.
    """
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
    """Print the last lines of the pod that failed, or KFP's messages if there are none.

    Errors of the connection are not raised.

    Returns:
        The step's own error message; "" if there is none.
    """
    try:
        if step not in (*steps.STEPS, *steps.EARLIER):
            raise ClusterError(f"{step} is a pod of KFP's own; the UI shows its log.")
        kube = Kube(kfp.settings)
        pods = _pods(kube, kfp.pods, run.run_id, step)
        failed = [pod for pod in pods if pod.status.phase == "Failed"] or pods
        # A pod that KFP started, and that launched other pods, reports on all of them.
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
    """The step's own lines of a log, without those of KFP's launcher and of Argo."""
    return [line for line in text.splitlines(keepends=True) if not _LAUNCHER.match(line)]


def error_of(lines: list[str]) -> str:
    """The error that a step ended with; "" if there is none, for example after a kill."""
    found = [match for line in lines if (match := _LAST_WORD.match(line))]
    return (found[-1][1] or found[-1][2]).strip() if found else ""


def ended_from_outside(kfp: Kfp, run: tp.Any, took: str) -> str:
    """The message about a run that failed although no step failed.

    The usual reason is that the Workflow became larger than 1 MiB (compressed), the limit of
    Kubernetes for one object. Argo writes the reason into the Workflow.
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
        why = f"No reason is given; {kfp.run_url(run.run_id)} may show more."
    return (
        f"was ended by Argo after {took}, though no step failed. {why} Its exit handler did not "
        f"run, so its dataset stays claimed for a while; `{called.by('submit')}` takes it over. "
        "Finished work is in storage and is skipped. If the run was too large, submit a smaller "
        "one, with a smaller n_parts or a smaller sweep."
    )


def _workflow_message(kfp: Kfp, run: tp.Any) -> str:
    """Argo's message in the Workflow; "" if the Workflow is deleted or may not be read."""
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
    """The pods of a step, or of all steps of a run; oldest first."""
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
    """The last lines of a pod's log, or all lines if `tail` is 0; "" if there is no log."""
    name = pod.metadata.name
    options = {"tail_lines": tail} if tail else {}
    try:
        with kube.explained(f"read the log of pod {name}"):
            # The raw answer is read, because the library would convert JSON lines to Python.
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
    """Name of the step's container: Argo and Kubeflow Trainer use different names."""
    names = [container.name for container in pod.spec.containers or []]
    return trainjobs.CONTAINER if trainjobs.CONTAINER in names else MAIN


def reasons(pod: tp.Any) -> str:
    """Why a pod does not run, by its status: no node, image, memory, eviction; "" if it runs."""
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
