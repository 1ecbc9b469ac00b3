"""Checks which failures Argo retries, by the settings of its controller and of KFP.

KFP's compiler writes how often a step is retried, but not after which failures. The installation
decides that. This was observed on KFP 2.17.0, and read in the sources of 2.15 and 2.16.
"""

import json
import typing as tp

import yaml

from pipelines.doctor.findings import Finding, ok, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube

CONFIG_MAP = "workflow-controller-configmap"
PATCH = "COMPILED_PIPELINE_SPEC_PATCH"
_WHAT = "retries in a new pod"
_DEFAULT = "Argo's default"
_FAILED = "steps that end with an error, are killed or run out of memory, and kubelet evictions"
_LOST = "pods that are deleted, evicted through the API, or lost with their node"
_NOT = {
    "OnError": (_LOST, _FAILED),
    "OnFailure": (_FAILED, _LOST),
    "Always": (f"{_FAILED}; {_LOST}", ""),
}
"""Policy → failures that are retried, and failures that are not."""


def retries(kube: Kube, version: str) -> Finding:
    """Which failures Argo retries in a new pod.

    Args:
        kube: the cluster.
        version: the version of KFP; "" if it is unknown.
    """
    try:
        policy, source = _policy(kube)
    except ClusterError as err:
        return warn(_WHAT, f"{err} {_as_installed(version)}", "")
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as err:
        return warn(_WHAT, f"the settings of Argo's controller cannot be read: {err}", "")
    if source == _DEFAULT and kube.settings.compile.get("retries") == 0:
        return ok(_WHAT, "none: retries = 0 in cluster.toml [compile], and no default is set")
    if policy not in _NOT:
        return warn(_WHAT, f"policy {policy} ({source}), which this check does not know", "")
    again, never = _NOT[policy]
    if policy == "Always":
        return warn(
            _WHAT,
            f"policy Always ({source}): {again}",
            "Whole loops are retried as well, so a permanent error is tried many times.",
        )
    return ok(
        _WHAT,
        f"policy {policy} ({source}): {again}. Not: {never}. A step's supervisor runs it again "
        "in its pod where that can help; else press Retry in the UI, or submit again",
    )


def _policy(kube: Kube) -> tuple[str, str]:
    """The retry policy of steps, and where it is set. Raises ClusterError or ValueError."""
    where = kube.settings.kfp_namespace
    for patch in _patches(kube, where):
        if policy := _of_defaults(patch.get("templateDefaults")):
            return policy, f"{PATCH} of deployment ml-pipeline"
    with kube.explained(f"read {CONFIG_MAP}"):
        data = kube.core.read_namespaced_config_map(CONFIG_MAP, where).data or {}
    whole = yaml.safe_load(data.get("config", "")) or {}  # Argo also reads settings from this key
    text = data.get("workflowDefaults")
    defaults = yaml.safe_load(text) if text else whole.get("workflowDefaults")
    if policy := _of_defaults(((defaults or {}).get("spec") or {}).get("templateDefaults")):
        return policy, CONFIG_MAP
    return "OnFailure", _DEFAULT


def _patches(kube: Kube, where: str) -> list[tp.Any]:
    """The patches that KFP applies to every Workflow. Raises ClusterError or ValueError."""
    try:
        with kube.explained(f"read {PATCH} of deployment ml-pipeline"):
            deployment = kube.apps.read_namespaced_deployment("ml-pipeline", where)
    except ClusterError as err:
        if err.status == 404:
            return []
        raise
    variables = [e for c in deployment.spec.template.spec.containers for e in c.env or []]
    return [json.loads(e.value) for e in variables if e.name == PATCH and e.value]


def _of_defaults(defaults: tp.Any) -> str:
    strategy = (defaults or {}).get("retryStrategy") or {}
    return str(strategy.get("retryPolicy") or "")


def _as_installed(version: str) -> str:
    """The default policy of a version of KFP, for when the settings cannot be read."""
    numbers = version.split(".")
    if not all(part.isdigit() for part in numbers[:2]) or len(numbers) < 2:
        return f"As installed, KFP 2.17 runs again {_LOST}; KFP 2.16 {_FAILED}."
    is_new = (int(numbers[0]), int(numbers[1])) >= (2, 17)
    again, never = _NOT["OnError" if is_new else "OnFailure"]
    return f"As KFP {version} is installed, Argo runs again {again}; not {never}."
