"""A TrainJob of Kubeflow Trainer 2: several machines that train the groups of one slot together.

Trainer makes a JobSet from the TrainJob and the TrainingRuntime in k8s/components/trainer. The
JobSet makes one pod for each machine. Each pod runs torchrun, which starts a rank for each GPU and
finds the other machines by environment variables that Trainer sets. When one pod ends, JobSet ends
all pods and makes new ones.

https://trainer.kubeflow.org
"""

import typing as tp

from saev import storage
from saev.launch import follow, pods
from saev.launch.cluster import Cluster, Json, Me, Resource
from saev.launch.follow import Failure, State
from saev.progress import Progress

_JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
JOBSETS = Resource("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet", _JOBSET_LABEL)
# While a TrainJob waits to be deleted, Trainer 2.3 makes its JobSet again and again. So the
# TrainJob is deleted before its JobSet.
TRAIN_JOBS = Resource(
    "trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob", _JOBSET_LABEL,
    ends_first=False, makes=(JOBSETS,),
)  # fmt: skip
RUNTIME = "saev-train"
"""Name of the TrainingRuntime."""

CONTAINER = "node"
"""The name that Trainer expects for the container and for the job."""
_MANAGER = "saev/launch"
"""Trainer requires a name for the author of a patch."""
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


class Machines:
    """The pods that train the groups of one slot together.

    Args:
        settings: the settings of the pods.
        command: the command of each machine's supervisor.
        n_machines: number of machines.
        work: what is trained: the URL of the job, and the slot. Equal work gets the same name.
        run_id: id of the pipeline run.
        me: the launching pod.
        queue: Kueue's queue; "" starts at once.
    """

    resource = TRAIN_JOBS
    container = CONTAINER

    def __init__(
        self,
        settings: pods.PodSettings,
        command: tp.Sequence[str],
        *,
        n_machines: int,
        work: tp.Sequence[str],
        run_id: str,
        me: Me,
        queue: str = "",
    ):
        # A machine's host name is this name and `-node-0-NUMBER`, in at most 63 characters.
        name = f"saev-{settings.step}-{storage.content_hash([run_id, *work], 12)}"
        # The supervisor does not retry inside its pod: all machines start again, in new pods.
        template = pods.template(
            settings.model_copy(update={"retries": 0}), command, run_id, me.service_account
        )
        self._n_machines, self._queue, self._name = n_machines, queue, name
        self.manifest = follow.manifest(
            TRAIN_JOBS,
            name,
            _spec(template, n_machines, settings),
            labels=pods.labels(settings.step, run_id),
            me=me,
            queue=queue,
        )
        self.selector = f"{_JOBSET_LABEL}={name}"

    def state(self, found: Json) -> State:
        """The TrainJob's state."""
        conditions = follow.conditions(found)
        of = f"{self._n_machines} machines"
        if "Complete" in conditions:
            return State("done", f"{of} have trained")
        if "Failed" in conditions:
            return State("failed", f"{of}: {conditions['Failed'].get('message', '')}".rstrip(". "))
        if found["spec"].get("suspend"):
            return State("waiting", f"suspended, waits for {self._queue or 'somebody'} to start it")
        ready = any(one.get("ready") for one in found.get("status", {}).get("jobsStatus", []))
        return State("running", f"{of} train" if ready else f"not all of {of} have started")

    def who(self, pod: Json) -> str:
        """The machine of a pod."""
        return f"machine {pod['metadata']['labels'].get(_INDEX_LABEL, '?')}"

    def failures(self, found: Json, pods: tp.Sequence[Json]) -> list[Failure]:
        """The machines that failed, permanent failures first: they may have ended the others."""
        made = [follow.failure_of(self.who(pod), pod, self.container) for pod in pods]
        return sorted(made, key=lambda failure: not failure.is_permanent)


def ranks_of(settings: pods.PodSettings) -> int:
    """Processes of one machine: one for each GPU, or one on CPUs."""
    return max(1, settings.gpus or 0)


def _spec(template: Json, n_machines: int, settings: pods.PodSettings) -> Json:
    from kubeflow_trainer_api import models

    pod, (container,) = template["spec"], template["spec"]["containers"]
    patched = ("nodeSelector", "tolerations", "imagePullSecrets", "volumes", "serviceAccountName")
    patch = {key: pod[key] for key in patched if pod.get(key)}
    patch["containers"] = [{"name": CONTAINER, "volumeMounts": container["volumeMounts"]}]
    job = {"metadata": {"labels": template["metadata"]["labels"]}, "spec": patch}
    jobs = [{"name": CONTAINER, "template": {"spec": {"template": job}}}]
    spec = models.TrainerV1alpha1TrainJobSpec.from_dict(
        {
            "runtimeRef": {
                "apiGroup": TRAIN_JOBS.group,
                "kind": "TrainingRuntime",
                "name": RUNTIME,
            },
            # The time starts again when a queue starts the TrainJob.
            "activeDeadlineSeconds": settings.timeout_seconds,
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "env": container["env"],
                "resourcesPerNode": container["resources"],
                "numNodes": n_machines,
                "numProcPerNode": ranks_of(settings),
            },
            "runtimePatches": [
                {
                    "manager": _MANAGER,
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                }
            ],
        }
    )
    assert spec is not None
    return tp.cast(Json, spec.to_dict())


def run(cluster: Cluster, machines: Machines, progress: Progress) -> None:
    """Make or adopt a TrainJob and follow it to its end. A successful one is deleted.

    Raises:
        SaevError: as :func:`saev.launch.follow.run`.
    """
    follow.run(cluster, machines, progress)
    # A TrainJob has no time to live, so it would stay until the run's Workflow is deleted.
    cluster.delete(TRAIN_JOBS, machines.manifest["metadata"]["name"], has_ended=True)
