"""An Indexed Job: one pod for each slot, a few at a time. Kubernetes replaces lost pods.

https://kubernetes.io/docs/concepts/workloads/controllers/job/
"""

import typing as tp

from saev import storage
from saev.interrupts import PERMANENT
from saev.launch import follow, pods
from saev.launch.cluster import Json, Me, Resource
from saev.launch.follow import Failure, State

JOBS = Resource("batch", "v1", "jobs", "Job", "batch.kubernetes.io/job-name")

INDEX = "$(JOB_COMPLETION_INDEX)"
"""The kubelet replaces this in a command by the number of the pod's slot."""
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_KEPT_SECONDS = 3600
"""How long a Job stays after its end, which is as long as KFP's pods stay."""


class Slots:
    """The pods that do the slots of one step.

    Args:
        settings: the settings of the pods.
        command: the command of each pod, with :data:`INDEX` in it.
        n_slots: number of slots.
        parallelism: most pods at a time.
        job: URL of the job that the slots belong to; a run may have several.
        run_id: id of the pipeline run.
        me: the launching pod.
        queue: Kueue's queue; "" starts at once.
    """

    resource = JOBS
    container = pods.MAIN

    def __init__(
        self,
        settings: pods.PodSettings,
        command: tp.Sequence[str],
        *,
        n_slots: int,
        parallelism: int,
        job: str,
        run_id: str,
        me: Me,
        queue: str = "",
    ):
        name = f"saev-{settings.step}-{storage.content_hash([run_id, job], 12)}"
        template = pods.template(settings, command, run_id, me.service_account)
        spec = _spec(template, n_slots, min(n_slots, parallelism), settings.retries)
        labels = pods.labels(settings.step, run_id)
        self._step, self._n_slots, self._queue = settings.step, n_slots, queue
        self.manifest = follow.manifest(JOBS, name, spec, labels=labels, me=me, queue=queue)
        self.selector = f"{JOBS.pod_label}={name}"

    def state(self, found: Json) -> State:
        """The Job's state."""
        status, conditions = found.get("status", {}), follow.conditions(found)
        done = status.get("succeeded", 0)
        n_failed = len(indexes(status.get("failedIndexes", "")))
        what = f"{done} of {self._n_slots} slots of {self._step} done"
        if "Complete" in conditions:
            return State("done", what)
        failed = f", {n_failed} failed" if n_failed else ""
        if "Failed" in conditions:
            why = "" if n_failed else f": {conditions['Failed'].get('message', '')}"
            return State("failed", f"{what}{failed}{why}")
        if found["spec"].get("suspend"):
            return State("waiting", f"suspended, waits for {self._queue or 'somebody'} to start it")
        running = status.get("ready", 0)
        waiting = max(0, status.get("active", 0) - running)
        starting = f", {waiting} waiting for a node or starting" if waiting else ""
        return State("running", f"{what}{failed}, {running} running{starting}")

    def who(self, pod: Json) -> str:
        """The slot of a pod."""
        return f"slot {pod['metadata']['labels'][_INDEX_LABEL]}"

    def failures(self, found: Json, pods: tp.Sequence[Json]) -> list[Failure]:
        """The slots that failed, each with its last pod."""
        last = {pod["metadata"]["labels"][_INDEX_LABEL]: pod for pod in pods}
        failed = indexes(found["status"].get("failedIndexes", ""))
        return [
            follow.failure_of(f"slot {i}", last.get(str(i)), self.container) for i in sorted(failed)
        ]


def _spec(template: Json, n_slots: int, parallelism: int, retries: int) -> Json:
    return {
        "completionMode": "Indexed",
        "completions": n_slots,
        "parallelism": parallelism,
        # The limit counts per slot, so a slot that always fails does not stop the others.
        "backoffLimitPerIndex": retries,
        "podReplacementPolicy": "Failed",  # so a slot never has two pods at the same time
        "podFailurePolicy": {
            "rules": [
                # An evicted or preempted pod, or a node that shuts down, is not the slot's fault.
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailIndex",
                    "onExitCodes": {
                        "containerName": pods.MAIN,
                        "operator": "In",
                        "values": [PERMANENT],
                    },
                },
            ]
        },
        "ttlSecondsAfterFinished": _KEPT_SECONDS,
        "template": template,
    }


def indexes(text: str) -> set[int]:
    """The numbers in a Job's list of indexes, such as ``1,3-5``."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
