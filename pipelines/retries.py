"""Starting the lost pods of a failed run again, through Kubeflow's Retry."""

import datetime
import typing as tp

from pipelines import steps
from pipelines.connect import Kfp
from saev import storage
from saev.errors import SaevError
from saev.launch import outcomes
from saev.launch import runs as api


def reason_against(run: tp.Any) -> str:
    """Why a failed run must not be retried by itself; empty if another try may succeed.

    A step says in storage why it failed. One whose pod was evicted or lost says nothing.
    """
    if steps.state_of(run) != "failed":
        return "it was canceled"
    root = str(((run.runtime_config and run.runtime_config.parameters) or {}).get("root", ""))
    if "://" not in root:
        return f"why it failed is said in {root or 'its root'}, which this machine does not see"
    try:
        found = outcomes.failures(storage.normalize(root), run.run_id, _ended_before(run))
    except SaevError as err:
        return f"this machine cannot see why it failed: {err}"
    permanent = outcomes.permanent(found)
    return f"step {permanent.step} failed for good" if permanent else ""


def retry(kfp: Kfp, run: tp.Any) -> None:
    """Start what did not succeed again, in the same run."""
    with kfp.explained(f"retry run {run.run_id}"):
        kfp.runs.run_service_retry_run(run_id=run.run_id)


def _ended_before(run: tp.Any) -> datetime.datetime | None:
    """When the run ended before this time, if it was retried."""
    history = run.state_history or []
    earlier = api.ends([entry.state for entry in history])
    return steps.real_time(history[earlier[-1]].update_time) if earlier else None
