"""What may happen to a step's process and pod, on the probe pipeline, several side by side."""

import collections.abc
import typing as tp

from conformance import probes
from conformance.cluster import Cluster
from conformance.table import Check, Failed, Noted
from pipelines import logs, runs, steps
from pipelines.definition import KILL_COMMAND

RUN_SECONDS = 420.0
START_SECONDS = 240.0
_DRIVERS = 3
"""Of a run without faults: of the pipeline, and of its two steps."""

Do = collections.abc.Callable[["Probe"], str]


class Probe:
    """One run of the probe pipeline."""

    def __init__(self, cluster: Cluster, pipeline: str, fault: str, name: str):
        self.cluster = cluster
        self.folder = cluster.at("probes", name.replace(" ", "-"))
        values = {"fault": fault, "folder": self.folder}
        self.run_id = cluster.start(f"probe-{name.replace(' ', '-')}", pipeline, values)

    def pods(self) -> list[tp.Any]:
        """Pods of the first step."""
        return self.cluster.pods(self.run_id, probes.FIRST)

    def log(self) -> str:
        """Logs of the first step's pods that are there."""
        return self.cluster.logs(self.run_id, probes.FIRST)

    def waiting(self) -> tp.Any:
        """The first step's pod, when its process waits for what comes from outside."""

        def look() -> tp.Any:
            pods = self.pods()
            return pods[-1] if pods and "probe: waits" in self.cluster.log(pods[-1]) else None

        return self.cluster.until(START_SECONDS, "the first step did not start", look)

    def succeed(self) -> tp.Any:
        """The run, which must succeed, with both of its steps."""
        run = self.cluster.succeed(self.run_id, RUN_SECONDS)
        said = self.cluster.logs(self.run_id, probes.SECOND)
        if "second: got" not in said:
            raise Failed(f"the run succeeded, but its second step said {said[-200:]!r}")
        return run

    def again(self) -> None:
        """`runs/{id}:retry`, as `make submit WAIT=1` does for what needs a new pod."""
        kfp = self.cluster.kfp
        with kfp.explained("retry the run"):
            kfp.runs.run_service_retry_run(self.run_id)
        self.cluster.until(
            60, "the retried run did not start",
            lambda: self.cluster.run(self.run_id).state not in steps.OVER or None,
        )  # fmt: skip


def checks(cluster: Cluster) -> list[Check]:
    """All of them."""
    # Compiled here, since kfp compiles one pipeline at a time.
    pipeline = probes.compiled(cluster.settings)

    def check(name: str, fault: str, judge: Do) -> Check:
        def do() -> str:
            return judge(Probe(cluster, pipeline, fault, name))

        return Check(f"fault: {name}", do)

    return [
        check("cancel", "wait", _cancel),
        check("pod deleted", "wait", _deleted),
        check("pod evicted", "wait", _evicted),
        check("process killed", "kill", _in_place),
        check("container killed", "container", _new_pod),
        check("memory grows", "memory", _memory),
        check("memory at once", "memory at once", _memory_at_once),
        check("passing error", "passing", _in_place),
        check("permanent error", "permanent", _permanent),
        check("driver deleted", "none", _driver),
    ]


def _in_place(probe: Probe) -> str:
    probe.succeed()
    pods, said = probe.pods(), probe.log()
    if len(pods) != 1:
        raise Failed(f"{len(pods)} pods of one step; the process should start again in its pod")
    if said.count("probe: start") != 2:
        raise Failed(f"the process started {said.count('probe: start')} times, not twice")
    return "started again in the same pod"


def _memory(probe: Probe) -> str:
    found = _in_place(probe)
    if "was ended before the kernel" not in probe.log():
        raise Failed("something else than the supervisor ended it")
    return f"ended by the supervisor before the kernel, {found}"


def _memory_at_once(probe: Probe) -> str:
    run = probe.cluster.end(probe.run_id, RUN_SECONDS)
    said, pods = probe.log(), probe.pods()
    if run.state == "SUCCEEDED":
        who = "the supervisor" if "was ended before the kernel" in said else "the kernel alone"
        return f"ended by {who}, {len(pods)} pod(s), the run succeeded by itself"
    why = "; ".join(filter(None, (logs.reasons(pod) for pod in pods))) or run.state
    if "OOMKilled" not in why:
        raise Failed(f"the run failed, and not of memory: {why}")
    probe.again()
    probe.succeed()
    return "the kernel ended the container, the run failed; retried through the API, it succeeded"


def _deleted(probe: Probe) -> str:
    pod = probe.waiting()
    probe.cluster.delete_pod(pod)
    return _new_pod(probe)


def _evicted(probe: Probe) -> str:
    pod = probe.waiting()
    probe.cluster.evict(pod)
    return _new_pod(probe)


def _new_pod(probe: Probe) -> str:
    run = probe.cluster.end(probe.run_id, RUN_SECONDS)
    if run.state == "SUCCEEDED":
        return f"a new pod took its place, {_starts(probe)} starts"
    probe.again()
    probe.succeed()
    return Noted(
        "this cluster makes no new pod; retried through the API, the run succeeded "
        "(docs/pipeline.md)"
    )


def _starts(probe: Probe) -> int:
    names = [key for key in probe.cluster.keys(*_below(probe)) if key.startswith("start-")]
    if len(names) != 2:
        raise Failed(f"the process started {len(names)} times, not twice")
    return len(names)


def _below(probe: Probe) -> tuple[str, ...]:
    return "probes", probe.folder.rpartition("/")[2]


def _permanent(probe: Probe) -> str:
    run = probe.cluster.end(probe.run_id, RUN_SECONDS)
    said = probe.log()
    if run.state == "SUCCEEDED":
        raise Failed("the run succeeded with a step that failed")
    if said.count("probe: start") != 1 or len(probe.pods()) != 1:
        raise Failed(f"it was tried {said.count('probe: start')} times; it cannot pass")
    last = said.strip().splitlines()[-1]
    if "saev: permanent error: A mistake" not in said:
        raise Failed(f"the log ends with {last!r}, which does not say why")
    return "tried once; the log says why"


def _cancel(probe: Probe) -> str:
    probe.waiting()
    cluster = probe.cluster
    runs.cancel(cluster.kfp, cluster.run(probe.run_id))
    run = cluster.end(probe.run_id, 180)
    if steps.state_of(run) != "canceled":
        raise Failed(f"the canceled run is called {steps.state_of(run)}")
    keys = cluster.keys(*_below(probe))
    said = probe.log()
    if "stopped.json" not in keys:
        raise Failed(
            "the process was ended without a word, so training would lose what came after its "
            "newest resume point",
            f"The log of the pod's container `wait` says whether Argo ran {KILL_COMMAND[0]}.",
        )
    last = [line for line in said.splitlines() if line.startswith("saev: ")]
    return f"the process was asked to end and wrote where it was; {last[-1] if last else 'no log'}"


def _driver(probe: Probe) -> str:
    """Each driver's pod is deleted as soon as it is seen, until one had to be made anew."""
    cluster, seen, deleted = probe.cluster, set[str](), set[str]()

    def over() -> tp.Any:
        drivers = [pod for pod in cluster.pods(probe.run_id) if not _is_step(pod)]
        seen.update(pod.metadata.name for pod in drivers)
        for pod in drivers:
            name, begun = pod.metadata.name, pod.status.phase in ("Pending", "Running")
            if begun and name not in deleted and len(seen) <= _DRIVERS:
                deleted.add(name)
                cluster.delete_pod(pod, grace_seconds=0)
        return run if (run := cluster.run(probe.run_id)).state in steps.OVER else None

    run = cluster.until(RUN_SECONDS, "the run was not over", over, 0.3)
    if run.state == "SUCCEEDED" and len(seen) > _DRIVERS:
        return f"a new pod took its place ({len(deleted)} deleted, {len(seen)} made)"
    if run.state == "SUCCEEDED":
        return f"{len(deleted)} were deleted, and had done their work before: no new one was needed"
    said = "; ".join(steps.messages(run)) or "no message"
    probe.again()
    cluster.succeed(probe.run_id, RUN_SECONDS)
    return Noted(f"the run failed ({said}); retried through the API, it succeeded")


def _is_step(pod: tp.Any) -> bool:
    return logs.STEP_LABEL in (pod.metadata.labels or {})
