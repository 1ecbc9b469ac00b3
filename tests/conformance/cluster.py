"""The cluster under test: what the checks do to it, and what they take back afterwards."""

import base64
import collections.abc
import contextlib
import copy
import gzip
import json
import secrets
import threading
import time
import typing as tp

import kfp_server_api
import yaml
from kubernetes import client

from conformance.inside import code
from conformance.table import Failed
from pipelines import arguments, logs, prepare, runs, schedule, steps, submit
from pipelines.connect import Kfp
from pipelines.doctor import probe
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.settings import Settings
from saev import storage
from saev.launch.pods import LABELS

T = tp.TypeVar("T")

POLL_SECONDS = 2.0
NAME = "saev-conformance"
LABEL = f"{NAME}/run"


class Workflow(tp.NamedTuple):
    """How large the object is in which Kubernetes keeps a run."""

    n_bytes: int
    """As JSON, with nodes that are not compressed."""
    n_nodes: int
    is_packed: bool
    """Whether Argo compressed the nodes, which KFP cannot read: above 1 MiB."""

    @classmethod
    def of(cls, item: dict[str, tp.Any]) -> tp.Self:
        """Measure one, as the API has it."""
        status = dict(item.get("status", {}))
        packed = status.pop("compressedNodes", "")
        if packed:  # https://github.com/argoproj/argo-workflows: util/file, gzip and base64
            status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        text = json.dumps({**item, "status": status}, separators=(",", ":"), ensure_ascii=False)
        return cls(len(text.encode()), len(status.get("nodes", ())), bool(packed))

    def __str__(self) -> str:
        packed = ", nodes packed" if self.is_packed else ""
        return f"Workflow {self.n_bytes / 1000:,.0f} kB{packed}"


class Cluster:
    """One run of the suite.

    Args:
        kfp: the connection.
        stopped: is set when waiting has no sense any more.
    """

    def __init__(self, kfp: Kfp, stopped: threading.Event):
        self.id = secrets.token_hex(3)
        self.base = storage.join(kfp.settings.root, f"{NAME}-{self.id}")
        self.settings = kfp.settings.model_copy(
            update={
                "experiment": f"{NAME}-{self.id}",
                "root": storage.join(self.base, "out"),
            }
        )
        self.stopped = stopped
        self.kfp = kfp
        self.kfp.settings = self.settings
        self.kube = Kube(self.settings)
        self.namespace = kfp.pods
        self.run_ids: list[str] = []
        self._uploaded: set[submit.Version] = set()
        self._new_pipelines: set[str] = set()
        self._lock = threading.Lock()

    @property
    def root(self) -> str:
        """URL of a storage root of its own, as the pods see it."""
        return self.settings.root

    def at(self, *names: str) -> str:
        """URL of something of this run: out is the storage root, data holds datasets."""
        return storage.join(self.base, *names)

    def data(self, name: str) -> str:
        """URL of a dataset."""
        return self.at("data", name)

    def experiment(self) -> str:
        """Id of an experiment of its own."""
        with self._lock:
            return submit.experiment(self.kfp)

    # --- Runs ------------------------------------------------------------------------------------

    def start(self, name: str, text: str, values: dict[str, tp.Any]) -> str:
        """Start a run of a pipeline that is not uploaded. Returns its id."""
        spec, platform = yaml.safe_load_all(text)
        body = kfp_server_api.V2beta1Run(
            display_name=f"{name}-{self.id}",
            experiment_id=self.experiment(),
            pipeline_spec={"pipeline_spec": spec, "platform_spec": platform},
            runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=values),
            service_account=self.settings.service_account,
        )
        with self.kfp.explained(f"start the run {name}"):
            run_id = self.kfp.runs.run_service_create_run(run=body).run_id
        self.run_ids.append(run_id)
        return run_id

    def submit(self, name: str, dataset: str, config: str, *, pairs: tp.Sequence[str] = ()) -> str:
        """`make submit`, without a look at the storage from here. Returns the run's id."""
        job = self.job("saev", dataset, config, pairs)
        self.upload(job)
        run_id = submit.start(self.kfp, job, f"{name}-{self.id}").run_id
        self.run_ids.append(run_id)
        return run_id

    def job(
        self,
        pipeline: tp.Literal["saev", "saev-incoming"],
        dataset: str,
        config: str,
        pairs: tp.Sequence[str] = (),
        extra: dict[str, tp.Any] | None = None,
    ) -> prepare.Job:
        """A run's pipeline and parameters, on CPUs and small."""
        small = ("gpu_count=0", "train_gpus=0", "n_parts=2")
        named = {pair.split("=")[0] for pair in pairs}
        chosen = [pair for pair in small if pair.split("=")[0] not in named]
        with self._lock:  # kfp compiles one pipeline at a time
            asked = arguments.Job(config=config, param=[*chosen, *pairs])
            return prepare.job(pipeline, self.settings, asked, dataset=dataset, extra=extra)

    def upload(self, job: prepare.Job) -> None:
        """Upload a pipeline and the one that it starts, and note what was not there before."""
        if job.started is not None:
            self.upload(job.started)
        with self._lock:
            before = self._pipeline(job.compiled.name)
            had = before is not None and self._has_version(before, job.compiled.digest)
            version = submit.upload(self.kfp, job.compiled)
            if before is None:
                self._new_pipelines.add(version.pipeline_id)
            if not had:
                self._uploaded.add(version)

    def run(self, run_id: str) -> tp.Any:
        """A run with its tasks."""
        return runs.get(self.kfp, run_id)

    def end(self, run_id: str, seconds: float) -> tp.Any:
        """A run when it is over. Raises Failed if it is not in time."""
        return self.until(
            seconds,
            f"run {run_id} was not over",
            lambda: run if (run := self.run(run_id)).state in steps.OVER else None,
        )

    def succeed(self, run_id: str, seconds: float) -> tp.Any:
        """A run that must succeed, when it is over."""
        run = self.end(run_id, seconds)
        if run.state != "SUCCEEDED":
            raise Failed(
                f"the run came to {run.state} in step {steps.failing(run) or 'unknown'}: "
                f"{self.last_word(run_id) or '; '.join(steps.messages(run)) or 'no message'}",
                f"{self.kfp.run_url(run_id)}; --keep leaves it there.",
            )
        return run

    def until(
        self,
        seconds: float,
        otherwise: str,
        look: collections.abc.Callable[[], T | None],
        pause: float = POLL_SECONDS,
    ) -> T:
        """What a look finds, as soon as it finds something. Raises Failed after some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ClusterError):  # an API server may be away for a moment
                if (found := look()) is not None:
                    return found
            if time.monotonic() > deadline:
                raise Failed(f"{otherwise} within {seconds:.0f} s")
            if self.stopped.wait(pause):
                raise Failed("interrupted")

    # --- Pods ------------------------------------------------------------------------------------

    def pods(self, run_id: str, step: str = "") -> list[tp.Any]:
        """A run's pods, oldest first; those of a step, or all, also KFP's own."""
        selector = f"{logs.RUN_LABEL}={run_id}" + (f",{logs.STEP_LABEL}={step}" if step else "")
        with self.kube.explained("list pods"):
            found = self.kube.core.list_namespaced_pod(self.namespace, label_selector=selector)
        return sorted(
            found.items, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name)
        )

    def workflow(self, run_id: str) -> "Workflow | None":
        """The object in which Kubernetes keeps a run; None if this user may not read it."""
        api = client.CustomObjectsApi(self.kube.new_client())
        try:
            with self.kube.explained("look at the Workflow"):
                answer = api.list_namespaced_custom_object(
                    "argoproj.io", "v1alpha1", self.namespace, "workflows",
                    label_selector=f"{logs.RUN_LABEL}={run_id}",
                )  # fmt: skip
        except ClusterError as err:
            if err.status in (403, 404):
                return None
            raise
        return Workflow.of(answer["items"][0]) if answer["items"] else None

    def log(self, pod: tp.Any) -> str:
        """What a step's pod has said until now, empty if it has not begun."""
        try:
            with self.kube.explained(f"read the log of pod {pod.metadata.name}"):
                answer = self.kube.core.read_namespaced_pod_log(
                    pod.metadata.name, self.namespace, container=logs.MAIN, _preload_content=False
                )
                return answer.data.decode("utf-8", "replace")
        except ClusterError as err:
            if err.status in (400, 404):
                return ""
            raise

    def logs(self, run_id: str, step: str = "") -> str:
        """The logs of a run's steps, or of one."""
        pods = self.pods(run_id, step)
        return "".join(
            self.log(pod) for pod in pods if logs.STEP_LABEL in (pod.metadata.labels or {})
        )

    def last_word(self, run_id: str) -> str:
        """With which line the log of the step that failed first ends."""
        kinds = ("saev: permanent", "saev: passing", "saev: stopped")
        said = (line for line in self.logs(run_id).splitlines() if line.startswith(kinds))
        return next(said, "")

    def python(self, program: str, *args: str) -> tp.Any:
        """Run a program of inside/ in a pod. Returns what its last line says, as JSON."""
        text = self.pod(["python", "-c", code(program), *args], " ".join((program, *args)))
        return json.loads(text.strip().splitlines()[-1])

    def pod(self, command: tp.Sequence[str], what: str, seconds: float = 180.0) -> str:
        """Run a command in a pod like a step's. Returns what it printed."""
        image = self.settings.cpu_image or self.settings.image
        trial = probe.Trial("", image, tuple(command), True)
        pod = probe.manifest(self.settings, prepare.pods(self.settings), trial)
        name = f"{NAME}-{self.id}-{secrets.token_hex(3)}"
        own_labels = {logs.STEP_LABEL: NAME, LABEL: self.id}
        pod["metadata"] |= {"name": name, "labels": {**LABELS, **own_labels}}
        with self.kube.explained("start a pod"):
            self.kube.core.create_namespaced_pod(self.namespace, pod)
        try:
            ended = self.until(seconds, f"pod {name} was not over", lambda: self._ended(name), 1.0)
            text = self.log(ended)
        finally:
            self._delete_pod(name)
        if ended.status.phase != "Succeeded":
            said = (text.strip().splitlines() or [logs.reasons(ended)])[-1]
            raise Failed(f"{what}: {said}")
        return text

    def storage(self, url: str, verb: str, *more: str) -> tp.Any:
        """Look at the storage or change it, with the pods' credentials; see inside/storage.py."""
        return self.python("storage", url, verb, *more)

    def keys(self, *names: str) -> list[str]:
        """Keys of all files below a folder, relative to it."""
        return [key for key, _ in self.storage(self.at(*names), "list")]

    def _ended(self, name: str) -> tp.Any:
        with self.kube.explained(f"look at pod {name}"):
            pod = self.kube.core.read_namespaced_pod(name, self.namespace)
        return pod if pod.status.phase in ("Succeeded", "Failed") else None

    def _delete_pod(self, name: str) -> None:
        with contextlib.suppress(ClusterError), self.kube.explained(f"delete pod {name}"):
            self.kube.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)

    def delete_pod(self, pod: tp.Any, grace_seconds: int = 30) -> None:
        """As `kubectl delete pod` does."""
        with self.kube.explained("delete a pod"):
            self.kube.core.delete_namespaced_pod(
                pod.metadata.name, self.namespace, grace_period_seconds=grace_seconds
            )

    def evict(self, pod: tp.Any) -> None:
        """As `kubectl drain` does."""
        name = pod.metadata.name
        body = client.V1Eviction(metadata=client.V1ObjectMeta(name=name, namespace=self.namespace))
        with self.kube.explained("evict a pod"):
            self.kube.core.create_namespaced_pod_eviction(name, self.namespace, body)

    # --- Afterwards ------------------------------------------------------------------------------

    def _has_version(self, pipeline_id: str, digest: str) -> bool:
        with self.kfp.explained(f"look for version {digest}"):
            answer = self.kfp.pipelines.pipeline_service_list_pipeline_versions(
                pipeline_id, filter=runs.named(digest), page_size=1
            )
        return bool(answer.pipeline_versions)

    def _pipeline(self, name: str) -> str | None:
        with self.kfp.explained(f"look for pipeline {name}"):
            answer = self.kfp.pipelines.pipeline_service_list_pipelines(
                filter=runs.named(name), page_size=1, **self.kfp.in_namespace
            )
        return answer.pipelines[0].pipeline_id if answer.pipelines else None

    def clean(self) -> list[str]:
        """Take everything back. Returns what could not be."""
        self.stopped.clear()
        left: list[str] = []
        for what, take_back in (
            ("schedules", self._switch_off),
            ("runs", self._clean_runs),
            ("schedules", self._clean_schedules),  # deletes the Workflows of their runs
            ("experiment", self._clean_experiment),
            ("versions of pipelines", self._clean_versions),
            ("files", lambda: self.storage(self.base, "delete")),
        ):
            try:
                take_back()
            except (ClusterError, Failed) as err:
                left.append(f"{what}: {err}")
        return left

    def _schedules(self) -> list[tp.Any]:
        return [item for item in schedule.existing(self.kfp) if item.display_name.endswith(self.id)]

    def _switch_off(self) -> None:
        for item in self._schedules():
            with self.kfp.explained("switch off a schedule"):
                self.kfp.recurring.recurring_run_service_disable_recurring_run(
                    item.recurring_run_id
                )

    def _clean_schedules(self) -> None:
        for item in self._schedules():
            with self.kfp.explained("delete a schedule"):
                self.kfp.recurring.recurring_run_service_delete_recurring_run(item.recurring_run_id)

    def mine(self) -> list[tp.Any]:
        """All runs of the experiment."""
        with self.kfp.explained("list runs"):
            answer = self.kfp.runs.run_service_list_runs(
                experiment_id=self.experiment(), page_size=200, sort_by="created_at desc"
            )
        return answer.runs or []

    def _clean_runs(self) -> None:
        for run in self.mine():
            with contextlib.suppress(ClusterError, Failed):
                if runs.cancel(self.kfp, run):
                    self.end(run.run_id, 120)
            with self.kfp.explained("delete a run"):
                self.kfp.runs.run_service_delete_run(run.run_id)

    def _clean_experiment(self) -> None:
        with self.kfp.explained("delete the experiment"):
            self.kfp.experiments.experiment_service_delete_experiment(self.experiment())

    def _clean_versions(self) -> None:
        delete = self.kfp.pipelines
        with self.kfp.explained("delete what was uploaded"):
            for version in self._uploaded:
                delete.pipeline_service_delete_pipeline_version(*version)
            for pipeline_id in self._new_pipelines:
                delete.pipeline_service_delete_pipeline(pipeline_id)


def with_settings(cluster: Cluster, **changes: tp.Any) -> Cluster:
    """The same cluster, as other settings show it."""
    other = copy.copy(cluster)
    other.settings = Settings(**{**cluster.settings.model_dump(), **changes})
    other.kfp = copy.copy(cluster.kfp)
    other.kfp.settings = other.settings
    other.kube = Kube(other.settings)
    return other
