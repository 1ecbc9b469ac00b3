"""Pods that a step makes itself: as a Job of Kubernetes, and as a TrainJob of Kubeflow Trainer."""

import io
import re
import typing as tp

import rich.console
from kubernetes import client, stream

from conformance.cluster import Cluster, with_settings
from conformance.jobs import CONFIG, LONG, RUN_SECONDS, Jobs, seconds
from conformance.table import Check, Failed, NotRun
from pipelines import logs, watch
from pipelines.doctor import access, machines
from pipelines.errors import ClusterError
from pipelines.options import PodOptions
from saev.launch import follow
from saev.launch.trainjobs import TRAIN_JOBS

KILL = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    words = path.read_bytes().split(b"\\0")
    if b"saev.steps.supervisor" in words and int(path.parent.name) != os.getpid():
        os.kill(int(path.parent.name), signal.SIGKILL)
"""
"""As a node that is lost does: the supervisor has no time to say why."""


class Launching:
    """Runs on the dataset of other runs, whose activations they find, with SAEs of their own.

    Args:
        jobs: the other runs.
    """

    def __init__(self, jobs: Jobs):
        self._jobs = jobs

    def slots(self) -> str:
        """Each step is one Job, and what it makes is complete."""
        cluster = self._with_jobs()
        config = self._jobs.config("slots", "seed = 1")
        run_id = cluster.submit("job-slots", self._jobs.dataset, config)
        run = cluster.succeed(run_id, RUN_SECONDS)
        made = self._listed(cluster, run_id)
        wanted = {"train", "infer", "summarise"}
        if not wanted <= made.keys():
            raise Failed(f"Jobs of {', '.join(sorted(made)) or 'no step'}; expected {wanted}")
        open_ = [step for step, job in made.items() if job.status.succeeded != job.spec.completions]
        if open_:
            raise Failed(f"the run succeeded before the slots of {', '.join(open_)} did")
        return f"{seconds(run)} for {len(made)} Jobs; {cluster.workflow(run_id) or 'no Workflow'}"

    def canceled(self) -> str:
        """The Jobs end with the run, and the claim is given back."""
        jobs = Jobs(self._with_jobs(), self._jobs.name)
        jobs.first = self._jobs.first
        found, run_id = jobs.cancel("cancel-slots")
        left = [
            step for step, job in self._listed(jobs.cluster, run_id).items()
            if not follow.has_ended(client.ApiClient().sanitize_for_serialization(job))
        ]  # fmt: skip
        if left:
            raise Failed(f"the Jobs of {', '.join(left)} outlive the run")
        return found

    def retried(self) -> str:
        """A pod that is lost ends the run, and `make submit WAIT=1` goes on with it."""
        cluster = self._jobs.cluster
        self._jobs.needs_first()
        jobs = self._jobs
        config = jobs.config("lost", f"seed = 2\n{LONG}", CONFIG.replace("4000", "2_000_000"))
        before = jobs.points()
        run_id = cluster.submit("job-lost", jobs.dataset, config)

        def every_pod_wrote() -> bool | None:
            groups = {point.group for point in jobs.points() - before}
            pods = cluster.pods(run_id, "train")
            return (bool(pods) and len(groups) >= len(pods)) or None

        cluster.until(
            RUN_SECONDS, "not every pod of training wrote a resume point", every_pod_wrote
        )
        _execute(cluster, cluster.pods(run_id, "train")[-1], KILL)
        said = io.StringIO()
        watch.wait(cluster.kfp, run_id, rich.console.Console(file=said, width=200), max_retries=2)
        if "Retry 1 of 2" not in said.getvalue():
            return "this cluster made a new pod by itself, and the run succeeded"
        found = re.findall(r"Continuing at step (\d+)", cluster.logs(run_id, "train"))
        if not found:
            raise Failed("it was retried by the client, and trained from the beginning")
        return f"retried by the client, training continued at step {found[-1]}"

    def machines(self) -> str:
        """One group is trained by two pods of a TrainJob, which is deleted when it has."""
        cluster = self._jobs.cluster
        self._jobs.needs_first()
        pods = PodOptions(train_nodes="2", train_gpus="0", gpu_count="0")
        for finding in machines.findings(cluster.kube, cluster.namespace, pods):
            if finding.level == "fail":
                raise NotRun(f"{finding.what}: {finding.found}")
        one_group = CONFIG.replace("max_parallel = 1", "max_parallel = 2")
        config = self._jobs.config("machines", "seed = 3", one_group)
        pairs = ["train_nodes=2"]
        run_id = cluster.submit("job-machines", self._jobs.dataset, config, pairs=pairs)
        run = cluster.succeed(run_id, RUN_SECONDS)
        said = cluster.logs(run_id, "train")
        if "2 machines have trained" not in said or "2 ranks share" not in said:
            raise Failed(f"the step's log does not say that two ranks trained: {said[-300:]!r}")
        with cluster.kube.explained("list TrainJobs"):
            left = cluster.kube.custom.list_namespaced_custom_object(
                TRAIN_JOBS.group, TRAIN_JOBS.version, cluster.namespace, TRAIN_JOBS.plural,
                label_selector=f"{logs.RUN_LABEL}={run_id}",
            )["items"]  # fmt: skip
        if left:
            raise Failed(f"the TrainJob {left[0]['metadata']['name']} is still there")
        return f"{seconds(run)}; two machines have trained, the TrainJob is deleted"

    def _with_jobs(self) -> Cluster:
        """The cluster with launch = "job"."""
        self._jobs.needs_first()
        cluster = self._jobs.cluster
        account = cluster.settings.service_account
        try:
            lacking = access.refused(cluster.kube, cluster.namespace, account, access.JOBS)
        except ClusterError as err:
            raise NotRun(f"nobody says whether {account} may make Jobs: {err}") from err
        if lacking:
            raise NotRun(f"{account} may not {lacking[0]}: COMPONENTS='… jobs' gives it that")
        return with_settings(cluster, compile={**cluster.settings.compile, "launch": "job"})

    def _listed(self, cluster: Cluster, run_id: str) -> dict[str, tp.Any]:
        """The Jobs of a run, by their steps."""
        with cluster.kube.explained("list Jobs"):
            found = cluster.kube.batch.list_namespaced_job(
                cluster.namespace, label_selector=f"{logs.RUN_LABEL}={run_id}"
            )
        return {job.metadata.labels[logs.STEP_LABEL]: job for job in found.items}


def checks(jobs: Jobs) -> list[Check]:
    """All of them, after those on which they stand."""
    mine = Launching(jobs)
    return [
        Check("job: a pod is lost, WAIT=1", mine.retried),
        Check("launched: slots as Jobs", mine.slots),
        Check("launched: canceled in training", mine.canceled),
        Check("launched: machines as a TrainJob", mine.machines),
    ]


def _execute(cluster: Cluster, pod: tp.Any, program: str) -> None:
    """Run a Python program in a step's container, as `kubectl exec` does."""
    core = client.CoreV1Api(client.ApiClient(cluster.kube.configuration))
    with cluster.kube.explained(f"run a command in pod {pod.metadata.name}"):
        stream.stream(
            core.connect_get_namespaced_pod_exec, pod.metadata.name, cluster.namespace,
            container=logs.MAIN, command=["python", "-c", program], stdout=True, stderr=True,
        )  # fmt: skip
