"""Checks the GPUs: which nodes have them, and how many are free."""

import collections.abc
import typing as tp

from pipelines.doctor.findings import Finding, fail, ok, skipped, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from pipelines.options import PodOptions

_WHAT = "GPUs"


def gpus(kube: Kube, pods: PodOptions | None) -> collections.abc.Iterator[Finding]:
    """Whether the GPUs that a run requests exist and are free.

    Args:
        kube: the cluster.
        pods: how the pods of every run are made; None if a parameter is wrong.
    """
    if pods is None:
        yield skipped(_WHAT, "the parameters, which say what a run asks for, are wrong")
        return
    kind, count = pods.gpu_type, max(int(pods.gpu_count), int(pods.train_gpus))
    if count == 0:
        yield skipped(_WHAT, "gpu_count is 0, so runs use the CPU")
        return
    try:
        with kube.explained("list the nodes"):
            nodes = kube.core.list_node().items
    except ClusterError as err:
        yield warn(_WHAT, str(err), "")
        return
    having = [node for node in nodes if _number(node.status.allocatable, kind)]
    if not having:
        yield _none(nodes, kind)
        return
    selector, tolerations = pods.node_selector, pods.tolerations
    usable = [node for node in having if not _refuses(node, selector, tolerations)]
    if not usable:
        why = "; ".join(sorted({_refuses(node, selector, tolerations) for node in having}))
        yield fail(
            _WHAT,
            f"{kind} is on {_nodes(len(having))}, but none of them accepts a run's pods: {why}",
            "Set tolerations or node_selector in cluster.toml [parameters].",
        )
        return
    yield _free(kube, usable, kind, count)


def _free(kube: Kube, nodes: list[tp.Any], kind: str, count: int) -> Finding:
    total = {node.metadata.name: _number(node.status.allocatable, kind) for node in nodes}
    shared = any("time-slicing" in _sharing(node) for node in nodes)
    note = ", each shared by time-slicing" if shared else ""
    found = f"{sum(total.values())} {kind} on {_nodes(len(nodes))}{note}"
    try:
        with kube.explained("list the pods of all namespaces"):
            pods = kube.core.list_pod_for_all_namespaces(
                field_selector="status.phase!=Succeeded,status.phase!=Failed"
            ).items
    except ClusterError as err:
        if err.status == 403:
            return ok(_WHAT, f"{found}; you may not see how many are free")
        return warn(_WHAT, found, str(err))
    free = dict(total)
    for pod in pods:
        if pod.spec.node_name in free:
            free[pod.spec.node_name] -= requested(pod, kind)
    most = max(free.values())
    found += f", {sum(max(0, n) for n in free.values())} free"
    if max(total.values()) < count:
        return fail(
            _WHAT,
            f"{found}; no node has the {count} that a pod of a run asks for",
            f"Set gpu_count and train_gpus to {max(total.values())} or less.",
        )
    if most < count:
        return warn(_WHAT, found, "Runs wait until some are free.")
    return ok(_WHAT, found)


def _none(nodes: list[tp.Any], kind: str) -> Finding:
    others = sorted(
        {
            name
            for node in nodes
            for name in node.status.allocatable or {}
            if ("gpu" in name or name.startswith("nvidia.com/"))
            and _number(node.status.allocatable, name)
        }
    )
    if others:
        remedy = f"The cluster has {', '.join(others)}: set gpu_type in cluster.toml [parameters]."
    else:
        remedy = (
            "Install the NVIDIA GPU operator or device plugin (docs/cluster.md), or set gpu_count "
            "to 0 in cluster.toml [parameters] to run on the CPU."
        )
    return fail(_WHAT, f"none of {_nodes(len(nodes))} has {kind}", remedy)


def requested(pod: tp.Any, kind: str) -> int:
    """How many of a resource a pod uses: the sum of its containers, or an init container's more."""

    def of(containers: list[tp.Any] | None) -> list[int]:
        limits = [
            (c.resources and (c.resources.limits or c.resources.requests)) for c in containers or []
        ]
        return [_number(limit, kind) for limit in limits]

    return max(sum(of(pod.spec.containers)), max(of(pod.spec.init_containers), default=0))


def _nodes(n: int) -> str:
    return f"{n} node{'s' * (n != 1)}"


def _number(quantities: dict[str, str] | None, kind: str) -> int:
    text = (quantities or {}).get(kind, "0")
    return int(text) if text.isdigit() else 0


def _sharing(node: tp.Any) -> str:
    return (node.metadata.labels or {}).get("nvidia.com/gpu.sharing-strategy", "")


def _refuses(node: tp.Any, selector: dict[str, str], tolerations: list[dict[str, str]]) -> str:
    """Why a node does not accept a run's pod; "" if it does."""
    if node.spec.unschedulable:
        return "cordoned"
    labels = node.metadata.labels or {}
    for key, value in selector.items():
        if labels.get(key) != value:
            return f"node_selector {key}={value} does not match"
    for taint in node.spec.taints or []:
        if taint.effect in ("NoSchedule", "NoExecute") and not any(
            _tolerates(toleration, taint) for toleration in tolerations
        ):
            value = f"={taint.value}" if taint.value else ""
            return f"taint {taint.key}{value}:{taint.effect} is not tolerated"
    return ""


def _tolerates(toleration: dict[str, str], taint: tp.Any) -> bool:
    if toleration.get("effect", taint.effect) != taint.effect:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", taint.key) == taint.key
    return toleration.get("key") == taint.key and toleration.get("value", "") == (taint.value or "")
