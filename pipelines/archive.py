"""Reads the logs of deleted pods from KFP's API server.

KFP deletes a run's Workflow and pods one hour after the run's end. Before that, Argo writes the
pods' logs to KFP's object store (`archiveLogs`). The API server serves such a log by the id of
Argo's node. The address is not in the API's description, and the UI does not pass it on.
"""

import collections.abc
import json
import typing as tp

from pipelines import steps
from pipelines.connect import Kfp
from pipelines.errors import ClusterError

_ERROR = '{"error_message"'
"""The start of an error that the API server appends to an answer that began as a success."""


class Kept(tp.NamedTuple):
    """One log."""

    step: str
    node: str
    """Id of Argo's node."""
    text: str


def logs(kfp: Kfp, run: tp.Any, step: str) -> collections.abc.Iterator[Kept]:
    """The kept logs of a run's steps, in the order of the steps.

    Args:
        kfp: the connection.
        run: the run.
        step: name of the step, or of its pods' label; empty means all.

    Raises:
        ClusterError: KFP does not serve logs at this address.
    """
    for name in (*steps.STEPS, *steps.EARLIER):
        if step in ("", name, "plan" if name in steps.EARLIER else name):
            for node in _nodes(run, name):
                if text := _log(kfp, run.run_id, node):
                    yield Kept(name, node, text)


def _nodes(run: tp.Any, name: str) -> list[str]:
    """The ids of a step's attempts: the nodes directly below the step's own nodes."""
    tasks = (run.run_details and run.run_details.task_details) or []
    children = [c for t in tasks if t.display_name == name for c in t.child_tasks or []]
    return list(dict.fromkeys(child.pod_name for child in children if child.pod_name))


def _log(kfp: Kfp, run_id: str, node: str) -> str:
    """The archived log of a node; "" if there is none."""
    with kfp.explained("read a log that KFP keeps"):
        text = kfp.text(f"/apis/v1alpha1/runs/{run_id}/nodes/{node}/log")
    said, mark, error = text.rpartition(_ERROR)
    if not mark:
        return text
    try:
        json.loads(mark + error)
    except ValueError:  # the step itself wrote a line that looks like such an error
        return text
    return said


def reason(err: ClusterError | None) -> str:
    """Why there are no logs, for people."""
    if err is None:
        return "KFP keeps none (archiveLogs of its Argo)"
    return f"KFP does not serve the ones that it keeps at this address ({err})"
