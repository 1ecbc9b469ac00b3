"""The slots of steps that launch their pods themselves (launch = "job"), from their Jobs.

KFP sees one task of such a step.
"""

import contextlib
import typing as tp

from pipelines import logs
from pipelines.connect import Kfp
from pipelines.kube import Kube
from saev.errors import SaevError
from saev.launch import jobs


class Slots(tp.NamedTuple):
    """How many slots of a step there are, and what they do."""

    total: int
    done: int
    running: int
    failed: int


class Looker:
    """Looks at the Jobs of runs.

    Args:
        kfp: the connection; its settings say whether runs have Jobs at all.
    """

    def __init__(self, kfp: Kfp):
        self._namespace = kfp.pods
        self._kube: Kube | None = None
        if kfp.settings.compile.get("launch") == "job":
            with contextlib.suppress(SaevError):  # without a kubeconfig, KFP says what it knows
                self._kube = Kube(kfp.settings)

    def slots(self, run: tp.Any) -> dict[str, Slots]:
        """The slots of a run's steps, by their names; none where Kubernetes does not tell."""
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
