"""Counts the slots of steps that launch their own pods (launch = "job"), by their Jobs.

KFP knows only one task of such a step.
"""

import contextlib
import typing as tp

from pipelines import logs
from pipelines.connect import Kfp
from pipelines.kube import Kube
from saev.errors import SaevError
from saev.launch import jobs


class Slots(tp.NamedTuple):
    """Numbers of a step's slots."""

    total: int
    done: int
    running: int
    failed: int


class JobReader:
    """Reads the Jobs of runs.

    Args:
        kfp: the connection. Its settings say whether runs have Jobs.
    """

    def __init__(self, kfp: Kfp):
        self._namespace = kfp.pods
        self._kube: Kube | None = None
        if kfp.settings.compile.get("launch") == "job":
            with contextlib.suppress(SaevError):  # without a kubeconfig, only KFP's view is shown
                self._kube = Kube(kfp.settings)

    def slots(self, run: tp.Any) -> dict[str, Slots]:
        """The slots of a run's steps, by the step's name; none if Kubernetes does not answer."""
        if self._kube is None:
            return {}
        try:
            with self._kube.explained("look at the run's Jobs"):
                found = self._kube.batch.list_namespaced_job(
                    self._namespace, label_selector=f"{logs.RUN_LABEL}={run.run_id}"
                ).items
        except SaevError:
            return {}
        return {job.metadata.labels[logs.STEP_LABEL]: _slots(job) for job in found}


def _slots(job: tp.Any) -> Slots:
    status = job.status
    failed = len(jobs.indexes(status.failed_indexes or ""))
    return Slots(job.spec.completions, status.succeeded or 0, status.ready or 0, failed)
