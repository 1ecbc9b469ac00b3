"""Checks whether a cluster is ready for runs. Prints one line for each check, with the remedy.

Nothing is changed. Checks that only a pod can do run in a short-lived pod for each image, which is
always deleted.
"""

import collections.abc
import contextlib
import typing as tp

import kfp_server_api
import rich.console

from pipelines import prepare
from pipelines.connect import Kfp, connect, is_in_cluster
from pipelines.doctor import access, machines, nodes, objects, probe, retries
from pipelines.doctor.findings import Finding, fail, ok, skipped, warn
from pipelines.kube import Kube
from pipelines.options import PodOptions
from pipelines.settings import Settings
from saev.errors import SaevError

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def examine(
    settings: Settings, console: rich.console.Console, *, pod: bool = True, dataset: str = ""
) -> bool:
    """Print a line for every check.

    Args:
        settings: the cluster.
        console: receives the lines.
        pod: whether a pod may be started.
        dataset: URL of a dataset that the pod lists; "" lists none.

    Returns:
        Whether nothing failed.
    """
    is_well = True
    for finding in _findings(settings, pod=pod, dataset=dataset):
        is_well = is_well and finding.level != "fail"
        console.print(f"{finding.level:5}", style=_STYLES[finding.level], end="", highlight=False)
        console.print(f"{finding.what}: ", end="", highlight=False)
        console.print(finding.found, highlight=False, markup=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"       {finding.remedy}", highlight=False, markup=False, soft_wrap=True)
    return is_well


def _findings(settings: Settings, *, pod: bool, dataset: str) -> collections.abc.Iterator[Finding]:
    kube, finding = _kubernetes(settings)
    yield finding
    with contextlib.ExitStack() as stack:
        kfp, finding = _kfp(settings, kube, stack)
        yield finding
        if kube is None:
            yield skipped("cluster", "the checks that need the Kubernetes API")
            return
        yield retries.retries(kube, _version(kube, settings.kfp_namespace))
        namespace = kfp.pods if kfp else settings.namespace or settings.kfp_namespace
        if settings.namespace not in ("", namespace):
            yield warn(
                f"namespace {settings.namespace}",
                f"no runs are there: this KFP is single-user and runs them in {namespace}",
                f"Remove KFP_NAMESPACE, or set it to {namespace}.",
            )
        yield objects.namespace(kube, namespace)
        yield from access.permissions(
            kube, namespace, is_multi_user=bool(kfp and kfp.multi_user), pod=pod
        )
        account = settings.service_account
        launches = settings.compile.get("launch") == "job"
        yield from access.service_account(kube, namespace, account, launches=launches)
        yield from access.schedule_account(
            kube, namespace, is_multi_user=bool(kfp and kfp.multi_user)
        )
        pods, finding = _parameters(settings)
        yield finding
        yield from nodes.gpus(kube, pods)
        yield from machines.findings(kube, namespace, pods)
        yield from objects.storage(kube, namespace)
        if not pod:
            yield skipped("pod", "image and storage, as --no-pod says")
        elif not settings.image or not settings.root:
            missing = "SAEV_IMAGE" if not settings.image else "SAEV_ROOT"
            yield skipped("pod", f"image and storage, since {missing} is not set")
        else:
            yield from probe.run(kube, namespace, pods or PodOptions(), dataset)


def _kubernetes(settings: Settings) -> tuple[Kube | None, Finding]:
    try:
        kube = Kube(settings)
        with kube.explained("connect"):
            version = kube.version.get_code().git_version
    except SaevError as err:
        # With an endpoint, runs can be submitted without it. Logs and these checks need it.
        say = warn if settings.endpoint else fail
        return None, say("Kubernetes API", str(err), "")
    return kube, ok("Kubernetes API", f"{kube.server.address}, version {version.removeprefix('v')}")


def _kfp(
    settings: Settings, kube: Kube | None, stack: contextlib.ExitStack
) -> tuple[Kfp | None, Finding]:
    what = "Kubeflow Pipelines API"
    if kube is None and not settings.endpoint and not is_in_cluster():
        return None, skipped(what, "there is neither Kubernetes nor KFP_ENDPOINT to reach it")
    try:
        kfp = stack.enter_context(connect(settings))
    except SaevError as err:
        return None, fail(what, str(err), "")
    mode = "multi-user" if kfp.multi_user else "single-user"
    version = _version(kube, settings.kfp_namespace) if kube else ""
    found = f"{kfp.server.address}, {mode}, version {version or 'unknown'}"
    ours = _minor(kfp_server_api.__version__)
    if version[:1].isdigit() and _minor(version) != ours:
        remedy = f"This client is made for {ours}; other versions of KFP 2 mostly work."
        return kfp, warn(what, found, remedy)
    return kfp, ok(what, found)


def _parameters(settings: Settings) -> tuple[PodOptions | None, Finding]:
    """The pod options of `cluster.toml`; None if `make submit` would refuse a parameter."""
    what = "parameters"
    try:  # any image will do: the parameters do not depend on it
        pods = prepare.pods(settings)
        any_image = settings.model_copy(update={"image": "any"})
        prepare.usual_parameters(prepare.compiled("saev", any_image, pods), settings)
    except SaevError as err:
        return None, fail(what, str(err), "")
    return pods, ok(what, ", ".join(settings.parameters) or "none, so runs take the defaults")


def _version(kube: Kube, namespace: str) -> str:
    """KFP's version, by the tag of the API server's image; "" if unknown."""
    try:
        with kube.explained("read KFP's version"):
            pods = kube.core.list_namespaced_pod(namespace, label_selector="app=ml-pipeline").items
    except SaevError:
        return ""
    images: list[tp.Any] = [c.image for pod in pods for c in pod.spec.containers]
    tags = [image.split("@")[0].rsplit(":", 1)[-1] for image in images if "api-server" in image]
    return tags[0] if tags else ""


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
