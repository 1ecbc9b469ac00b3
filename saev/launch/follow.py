"""Makes an object that has pods, or adopts the one that is there, and follows it to its end.

The object's name is the same for every try of a step, and an annotation tells what it was made
from. So a launching pod that is lost finds what the one before it made.
"""

import logging
import re
import time
import typing as tp

from saev import storage
from saev.errors import LaunchError, SaevError
from saev.interrupts import PERMANENT
from saev.launch import pods
from saev.launch.cluster import Cluster, Json, Me, Resource
from saev.launch.lines import Logs
from saev.progress import Progress

logger = logging.getLogger(__name__)

DIGEST = "saev/made-from"
"""Annotation: digest of the specification, before Kubernetes or a queue filled it in."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Kueue starts a suspended object with this label when its queue has room for it."""

_LOOK_SECONDS = 10
"""Pods are looked at so often, and when the object changes, but not more often than the next."""
_LEAST_SECONDS = 2.0
_SAY_SECONDS = 30.0
_STOP_SECONDS = 25
"""Argo gives the launching pod 30 s to end; the exit handler waits for the rest."""
_STARTING = "PodInitializing"
_SHOWN = 5
"""Of many that failed, so many are described."""
_LAST_WORD = re.compile(r"saev: (?P<kind>permanent|passing) error(?:, tried [^:]*)?: (?P<text>.*)")

Phase = tp.Literal["waiting", "running", "done", "failed"]


class State(tp.NamedTuple):
    """What an object says of itself."""

    phase: Phase
    text: str
    """For people, such as ``3 of 6 slots done, 2 running``."""


class Failure(tp.NamedTuple):
    """What became of one of the pods."""

    who: str
    """Such as ``slot 3``."""
    is_permanent: bool
    """Whether it would fail again until somebody changes something."""
    why: str
    pod: str
    """Name of the pod; empty if it is gone."""


class Workload(tp.Protocol):
    """A kind of object that can be followed."""

    resource: Resource
    manifest: Json
    """With its name, labels and owner; :func:`manifest` makes it."""
    selector: str
    """Label selector of its pods."""
    container: str
    """Name of the container whose log is passed on."""

    def state(self, found: Json) -> State:
        """What the object says of itself."""

    def who(self, pod: Json) -> str:
        """What stands before the lines of a pod, such as ``slot 3``."""

    def failures(self, found: Json, pods: tp.Sequence[Json]) -> list[Failure]:
        """What failed of an object that has failed."""


def manifest(
    resource: Resource,
    name: str,
    spec: Json,
    *,
    labels: tp.Mapping[str, str],
    me: Me,
    queue: str = "",
) -> Json:
    """An object's manifest.

    Args:
        resource: its kind.
        name: its name, which does not depend on the try.
        spec: its specification; ``suspend`` is added where there is a queue.
        labels: the run's.
        me: the launching pod, whose owner it gets: it is deleted with the run's Workflow.
        queue: Kueue's queue; empty starts at once.
    """
    spec = {**spec, "suspend": bool(queue)}
    digest = storage.content_hash({"spec": spec, "queue": queue}, 16)
    metadata: Json = {"name": name, "labels": dict(labels), "annotations": {DIGEST: digest}}
    if queue:
        metadata["labels"][QUEUE_LABEL] = queue
    if me.owner is not None:
        metadata["ownerReferences"] = [me.owner]
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": metadata,
        "spec": spec,
    }


def run(cluster: Cluster, workload: Workload, progress: Progress) -> None:
    """Make or adopt an object, and follow it to its end.

    Whoever stops this stops the pods. They go on if this process is lost, or its pod is deleted:
    then the next one follows them, or the exit handler of the run stops them.

    Raises:
        LaunchError: it failed, it is gone, or the API refuses.
        SaevError: what ``progress.safe_point`` raises, such as that the claim is lost.
    """
    logs = Logs(cluster, workload.container)
    try:
        found = _ensure(cluster, workload, progress)
        found = _to_the_end(cluster, workload, found, progress, logs)
    except _Withdrawn as err:
        stop(cluster, workload)
        raise err.why from None
    except (KeyboardInterrupt, SystemExit):
        if cluster.is_leaving():
            logger.info("This pod is deleted; %s goes on without it.", _name(workload))
        else:
            stop(cluster, workload)
            logs.finish(1.0)
        raise
    logs.finish()
    if workload.state(found).phase == "failed":
        raise _failed(cluster, workload, found, logs)


def stop(cluster: Cluster, workload: Workload) -> None:
    """Delete the object, and wait a little until its pods have written what they have."""
    name = _name(workload)
    logger.info("%s is deleted; its pods are asked to end.", name)
    cluster.delete(workload.resource, name)
    deadline = time.monotonic() + _STOP_SECONDS
    while cluster.is_there(workload.resource, name) and time.monotonic() < deadline:
        time.sleep(1.0)


def stop_all(
    cluster: Cluster, resources: tp.Iterable[Resource], run_id: str, seconds: float
) -> list[str]:
    """Delete what a run has started and what has not ended; for its exit handler.

    Args:
        cluster: where.
        resources: kinds of objects to look for.
        run_id: the run.
        seconds: how long the pods' end is waited for.

    Returns:
        Names of what was deleted.
    """
    labels = {pods.RUN_LABEL: run_id}
    open_ = [
        (resource, found["metadata"]["name"])
        for resource in resources
        for found in cluster.listed(resource, labels)
        if not has_ended(found)
    ]
    for resource, name in open_:
        cluster.delete(resource, name)
    deadline = time.monotonic() + seconds
    left = open_
    while left and time.monotonic() < deadline:
        time.sleep(1.0)
        left = [(r, name) for r, name in left if cluster.is_there(r, name)]
    for _, name in left:
        logger.warning("%s still has pods that have not ended.", name)
    return [name for _, name in open_]


def has_ended(found: Json) -> bool:
    """Whether an object is complete or has failed."""
    return bool({"Complete", "Failed"} & set(conditions(found)))


def conditions(found: Json) -> dict[str, Json]:
    """The conditions that are true, by type."""
    listed = found.get("status", {}).get("conditions", [])
    return {c["type"]: c for c in listed if c.get("status") == "True"}


# --- One after the other -------------------------------------------------------------------------


class _Withdrawn(Exception):
    """The work must not go on."""

    def __init__(self, why: SaevError):
        self.why = why


def _check(progress: Progress) -> None:
    try:
        progress.safe_point()
    except SaevError as err:
        raise _Withdrawn(err) from err


def _ensure(cluster: Cluster, workload: Workload, progress: Progress) -> Json:
    """The object of this manifest: the one that is there, or a new one."""
    resource, name = workload.resource, _name(workload)
    while True:
        _check(progress)
        found = cluster.get(resource, name)
        if found is None and cluster.is_there(resource, name):
            time.sleep(_LEAST_SECONDS)
        elif found is None:
            made = cluster.create(resource, workload.manifest)
            if made is not None:
                logger.info("%s is made.", name)
                return made
        elif "deletionTimestamp" in found["metadata"]:
            time.sleep(_LEAST_SECONDS)
        elif _is_same(found, workload.manifest) and workload.state(found).phase != "failed":
            logger.info("%s is there already and is followed.", name)
            return found
        else:
            logger.info("%s of an earlier try is replaced.", name)
            cluster.delete(resource, name, has_ended=has_ended(found))


def _is_same(found: Json, wanted: Json) -> bool:
    """Whether an object was made from a manifest, for the same Workflow."""

    def marks(one: Json) -> tuple[str, list[str]]:
        metadata = one["metadata"]
        owners = [owner["uid"] for owner in metadata.get("ownerReferences", [])]
        return metadata.get("annotations", {}).get(DIGEST, ""), owners

    return marks(found) == marks(wanted)


def _to_the_end(
    cluster: Cluster, workload: Workload, found: Json, progress: Progress, logs: Logs
) -> Json:
    """Follow an object until it has ended. Returns it as it is then."""
    name, uid = found["metadata"]["name"], found["metadata"]["uid"]
    said, next_time, waits = "", 0.0, set[str]()
    while True:
        _check(progress)
        state = workload.state(found)
        if state.text != said and (time.monotonic() >= next_time or has_ended(found)):
            logger.info("%s: %s", name, state.text)
            said, next_time = state.text, time.monotonic() + _SAY_SECONDS
        if state.phase in ("done", "failed"):
            return found
        listed = cluster.pods(workload.selector, "!=Succeeded")
        running = [pod for pod in listed if pod["status"]["phase"] == "Running"]
        logs.attend({pod["metadata"]["name"]: workload.who(pod) for pod in running})
        for pod in listed:
            why = waits_for(pod)
            if why and why not in waits:
                logger.warning("%s waits: %s", workload.who(pod), why)
                waits.add(why)
        looked = time.monotonic()
        cluster.wait(workload.resource, found, _LOOK_SECONDS)
        time.sleep(max(0.0, looked + _LEAST_SECONDS - time.monotonic()))
        now = cluster.get(workload.resource, name)
        if now is None or now["metadata"]["uid"] != uid or "deletionTimestamp" in now["metadata"]:
            raise LaunchError(f"{name} was deleted by somebody else while it ran.", passing=True)
        found = now


def waits_for(pod: Json) -> str:
    """Why a pod does not start: no node has room, no such image, no such volume; or nothing."""
    status = pod["status"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason", "ContainerCreating") not in ("ContainerCreating", _STARTING):
            return f"{waiting['reason']}: {waiting.get('message', '')}"
    return ""


def _name(workload: Workload) -> str:
    return str(workload.manifest["metadata"]["name"])


# --- Why it failed -------------------------------------------------------------------------------


def _failed(cluster: Cluster, workload: Workload, found: Json, logs: Logs) -> LaunchError:
    """The error of an object that has failed, after the last lines of the pods that did."""
    failures = workload.failures(found, cluster.pods(workload.selector, "=Failed"))
    for failure in failures[:_SHOWN]:
        if failure.pod:
            logs.last_lines(failure.pod, failure.who)
    said = [f"{f.who} ({'permanent' if f.is_permanent else 'passing'}): {f.why}" for f in failures]
    more = f" And {len(said) - _SHOWN} more." if len(said) > _SHOWN else ""
    text = f"{workload.state(found).text}. {' '.join(said[:_SHOWN])}{more}"
    # Kubernetes has started new pods already, as often as the run's settings say.
    return LaunchError(text, passing=not any(f.is_permanent for f in failures), spent=True)


def failure_of(who: str, pod: Json | None, container: str) -> Failure:
    """What a pod that failed says about why.

    Args:
        who: such as ``slot 3``.
        pod: the pod; None if it is gone.
        container: name of its container.
    """
    if pod is None:
        return Failure(who, False, "its pod is gone.", "")
    name, status = pod["metadata"]["name"], pod["status"]
    ended: Json = next(
        (
            one["state"]["terminated"]
            for one in status.get("containerStatuses", [])
            if one["name"] == container and "terminated" in one.get("state", {})
        ),
        {},
    )
    lines = (ended.get("message") or "").strip().splitlines()
    last = _LAST_WORD.match(lines[-1]) if lines else None
    is_permanent = ended.get("exitCode") == PERMANENT
    if last is not None:
        return Failure(who, is_permanent, last["text"], name)
    if status.get("reason"):  # of the kubelet: Evicted, DeadlineExceeded
        return Failure(who, False, f"{status['reason']}: {status.get('message', '')}", name)
    if ended:
        reason = f", {ended['reason']}" if ended.get("reason") else ""
        return Failure(who, is_permanent, f"exit status {ended['exitCode']}{reason}.", name)
    return Failure(who, False, "its pod failed and does not say why.", name)
