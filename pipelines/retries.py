"""Retries failed runs: Kubeflow starts the pods again that did not succeed."""

import datetime
import typing as tp

from pipelines import steps
from pipelines.connect import Kfp
from saev import storage
from saev.errors import SaevError
from saev.launch import outcomes
from saev.launch import runs as api


def reason_against(run: tp.Any) -> str:
    """Why a failed run must not be retried automatically; "" if a retry may succeed.

    A failed step records the reason in storage. If its pod was evicted or lost, there is no record.
    """
    if steps.state_of(run) != "failed":
        return "it was canceled"
    root = str(((run.runtime_config and run.runtime_config.parameters) or {}).get("root", ""))
    if "://" not in root:
        return f"the reason is stored in {root or 'its root'}, which this machine cannot read"
    try:
        found = outcomes.failures(storage.normalize(root), run.run_id, _ended_before(run))
    except SaevError as err:
        return f"this machine cannot see why it failed: {err}"
    permanent = outcomes.permanent(found)
    return f"step {permanent.step} failed permanently" if permanent else ""


def retry(kfp: Kfp, run: tp.Any) -> None:
    """Start the pods again that did not succeed, in the same run."""
    with kfp.explained(f"retry run {run.run_id}"):
        kfp.runs.run_service_retry_run(run_id=run.run_id)


def _ended_before(run: tp.Any) -> datetime.datetime | None:
    """When the run ended before its last retry; None if it was not retried."""
    history = run.state_history or []
    earlier = api.ends([entry.state for entry in history])
    return steps.real_time(history[earlier[-1]].update_time) if earlier else None
