"""Makes an object that has pods, or adopts an existing one, and follows it to its end.

The object's name is the same for every try of a step, and an annotation holds a digest of its
specification. So when a launching pod is lost, the next one finds the object and goes on with it.
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
"""Annotation: digest of the specification that was sent. Kubernetes and queues change it later."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Label with the queue. Kueue starts a suspended object when its queue has room for it."""

_LOOK_SECONDS = 10
"""Seconds between two looks at the pods, unless the object changes earlier."""
_LEAST_SECONDS = 2.0
"""Fewest seconds between two looks."""
_SAY_SECONDS = 30.0
"""Fewest seconds between two messages about the state."""
_STOP_SECONDS = 25
"""Seconds to wait for the pods' end. Argo gives the launching pod 30 s; the exit handler waits for
pods that take longer."""
_STARTING = "PodInitializing"
_SHOWN = 5
"""How many failures an error describes."""
_LAST_WORD = re.compile(r"saev: (?P<kind>permanent|passing) error(?:, tried [^:]*)?: (?P<text>.*)")

Phase = tp.Literal["waiting", "running", "done", "failed"]


class State(tp.NamedTuple):
    """The state of an object."""

    phase: Phase
    text: str
    """A description for people, such as ``3 of 6 slots done, 2 running``."""


class Failure(tp.NamedTuple):
    """The failure of one pod."""

    who: str
    """What the pod does, such as ``slot 3``."""
    is_permanent: bool
    """Whether the same would fail again until somebody changes something."""
    why: str
    pod: str
    """Name of the pod; "" if it is gone."""


class Workload(tp.Protocol):
    """A kind of object that can be followed."""

    resource: Resource
    manifest: Json
    """The object with its name, labels and owner; :func:`manifest` makes it."""
    selector: str
    """Label selector of its pods."""
    container: str
    """Name of the container whose log is passed on."""

    def state(self, found: Json) -> State:
        """The object's state."""

    def who(self, pod: Json) -> str:
        """The prefix of a pod's log lines, such as ``slot 3``."""

    def failures(self, found: Json, pods: tp.Sequence[Json]) -> list[Failure]:
        """The failures of an object that has failed.

        Args:
            found: the object.
            pods: its pods that failed.
        """


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
        resource: the object's kind.
        name: its name, which is the same for every try.
        spec: its specification, to which ``suspend`` is added.
        labels: its labels.
        me: the launching pod. The object gets the same owner, so it is deleted with the run's
            Workflow.
        queue: Kueue's queue; "" starts at once.
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

    A signal to this process also stops the pods. If this process is lost, or its pod is deleted,
    the pods go on: the next launching pod follows them, or the run's exit handler stops them.

    Raises:
        LaunchError: the object failed or is gone, or the API refuses.
        SaevError: ``progress.safe_point`` raised it, for example because the claim is lost.
    """
    logs = Logs(cluster, workload.container)
    try:
        found = _ensure(cluster, workload, progress)
        found = _to_the_end(cluster, workload, found, progress, logs)
    except _MustStop as err:
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
    """Delete the object, and wait a little while its pods write their resume points."""
    name = _name(workload)
    logger.info("%s is deleted; its pods are asked to end.", name)
    cluster.delete(workload.resource, name)
    deadline = time.monotonic() + _STOP_SECONDS
    while cluster.is_there(workload.resource, name) and time.monotonic() < deadline:
        time.sleep(1.0)


def stop_all(
    cluster: Cluster, resources: tp.Iterable[Resource], run_id: str, seconds: float
) -> list[str]:
    """Delete the objects of a run that have not ended. The run's exit handler calls this.

    Args:
        cluster: the namespace.
        resources: kinds of objects to look for.
        run_id: the run.
        seconds: how long to wait for the end of the pods.

    Returns:
        Names of the deleted objects.
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


# --- The parts of `run` --------------------------------------------------------------------------


class _MustStop(Exception):
    """The work must not go on, for a reason that `progress.safe_point` gave."""

    def __init__(self, why: SaevError):
        self.why = why


def _check(progress: Progress) -> None:
    try:
        progress.safe_point()
    except SaevError as err:
        raise _MustStop(err) from err


def _ensure(cluster: Cluster, workload: Workload, progress: Progress) -> Json:
    """The object of this manifest: the existing one, or a new one."""
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
    """Why a pod does not start, such as a missing image or no node with room; "" if it does."""
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
    """The error of an object that has failed. Writes the last log lines of its failed pods."""
    failures = workload.failures(found, cluster.pods(workload.selector, "=Failed"))
    for failure in failures[:_SHOWN]:
        if failure.pod:
            logs.last_lines(failure.pod, failure.who)
    said = [f"{f.who} ({'permanent' if f.is_permanent else 'passing'}): {f.why}" for f in failures]
    more = f" And {len(said) - _SHOWN} more." if len(said) > _SHOWN else ""
    text = f"{workload.state(found).text}. {' '.join(said[:_SHOWN])}{more}"
    # It counts as retried: Kubernetes has replaced the pods as often as the run's settings allow.
    return LaunchError(text, passing=not any(f.is_permanent for f in failures), spent=True)


def failure_of(who: str, pod: Json | None, container: str) -> Failure:
    """Why a pod failed, by its status and the last line of its log.

    Args:
        who: what the pod does, such as ``slot 3``.
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
    if status.get("reason"):  # from the kubelet: Evicted, DeadlineExceeded
        return Failure(who, False, f"{status['reason']}: {status.get('message', '')}", name)
    if ended:
        reason = f", {ended['reason']}" if ended.get("reason") else ""
        return Failure(who, is_permanent, f"exit status {ended['exitCode']}{reason}.", name)
    return Failure(who, False, "its pod failed and does not say why.", name)
