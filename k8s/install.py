#!/usr/bin/env python3
"""Installs and uninstalls saev's part of a cluster: `make install`, `make uninstall`.

Needs kubectl and Python's standard library only. The API server has to accept all objects in a dry
run before anything is changed. Objects that somebody else made are not taken over. Data is deleted
only when its claim is named.

Kustomize makes the objects and server-side apply writes them. This module deletes what an earlier
installation left behind, because kubectl's own pruning does not keep these promises (tried with
kubectl 1.36 and an API server 1.34):

* `kubectl apply --prune -l …` does not delete objects that server-side apply made ("--prune is in
  alpha and doesn't currently work on objects created by server-side apply"). Client-side apply
  overwrites fields that others set.
* `kubectl apply --prune --applyset=…` (alpha, behind KUBECTL_APPLYSET) deletes the claim with the
  data when the overlay changes from pvc to s3, and cannot be told to spare a kind. It also does not
  delete what was installed before the set existed, so an upgrade would leave things behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from kubectl import InstallError, Json, Key, Unreachable, items, key_of, kubectl, meaning
from manifests import (
    COMPONENTS,
    CONFIG_ENV,
    OVERLAYS,
    SERVERS,
    STORAGE_ENV,
    Plan,
    check,
    keys_in,
    keys_of_component,
    render,
    shown,
)

MANAGER = "saev-install"
PART_OF = "app.kubernetes.io/part-of"
MADE_HERE = f"{PART_OF}=saev,app.kubernetes.io/managed-by=kustomize"
"""Labels of everything that is installed."""
DATA = ("PersistentVolumeClaim", "Secret")
"""Kinds that an installation never deletes: they hold files, and keys that may be nowhere else."""
KINDS = (
    "deployment",
    "service",
    "networkpolicy",
    "resourcequota",
    "limitrange",
    "rolebinding",
    "role",
    "serviceaccount",
    "configmap",
    "secret",
    "persistentvolumeclaim",
)
"""Kinds of the objects that an installation has in a namespace."""
RUNTIME_GROUP = "trainer.kubeflow.org"
RUNTIME = f"trainingruntime.{RUNTIME_GROUP}"
"""One more kind, in clusters that have Kubeflow Trainer."""


def install(plan: Plan, *, dry_run: bool, prune: bool = False) -> None:
    """Show what changes, in a dry run of the server, and apply it.

    Args:
        plan: what to install where.
        dry_run: change nothing. Then a cluster that cannot be reached is no error.
        prune: also delete objects of components that the plan does not name.
    """
    check(plan)
    try:
        where = locate(plan)
    except Unreachable as error:
        if not dry_run:
            raise
        preview(plan, error)
        return
    plan = as_it_is(plan)
    text = render(plan)
    live = {key_of(item): item for item in items(_live(text))}
    apply = ("apply", "--server-side", f"--field-manager={MANAGER}", "-f", "-", "-o", "json")
    accepted = items(kubectl(*apply, "--dry-run=server", stdin=text, warnings=True))
    say(f"{where}: the server accepts")
    for item in sorted(accepted, key=key_of):
        before = live.get(key_of(item))
        same = before is not None and meaning(before) == meaning(item)
        verb = "create" if before is None else "keep" if same else "change"
        say(f"  {verb:<7} {item['kind']}/{item['metadata']['name']}")
    if plan.settings:
        say(f"  keep    {', '.join(sorted(plan.settings))} (there is no {shown(CONFIG_ENV)} here)")
    delete = []
    for (kind, name), component in left_behind(plan, {key_of(item) for item in accepted}).items():
        if not component:
            say(f"  delete  {kind}/{name} (of another overlay or version)")
        elif prune:
            say(f"  delete  {kind}/{name} (of component {component})")
        else:
            say(f"  keep    {kind}/{name} (of component {component}; PRUNE=1 deletes it)")
        if prune or not component:
            delete.append((kind, name))
    if dry_run:
        say("Nothing was changed (DRY_RUN).")
        return
    kubectl(*apply, stdin=text)
    _delete(plan.namespace, delete)
    say("Done.")
    advise(plan)


def preview(plan: Plan, error: Unreachable) -> None:
    """Show what an installation applies, without a cluster to compare it with."""
    say(str(error).strip())
    say(f"Not compared with any cluster: for namespace {plan.namespace}, this is applied")
    for kind, name in sorted(keys_in(render(plan))):
        say(f"  apply   {kind}/{name}")
    say("Nothing was changed (DRY_RUN).")


def left_behind(plan: Plan, wanted: set[Key]) -> dict[Key, str]:
    """The objects of earlier installations that this one does without, except data.

    Another overlay made them, an earlier version, or a component that is not named now. The last
    ones are told apart, because a component left out by mistake must not open a namespace.

    Args:
        plan: what is installed.
        wanted: its objects.

    Returns:
        Each object's component, or "" where it is of none.
    """
    owners = {key: name for name in COMPONENTS for key in keys_of_component(name)}
    found = {}
    for item in installed(plan.namespace):
        managers = {one.get("manager") for one in item["metadata"].get("managedFields", ())}
        key = key_of(item)
        if key not in wanted and item["kind"] not in DATA and MANAGER in managers:
            found[key] = owners.get(key, "")
    return dict(sorted(found.items()))


def installed(namespace: str) -> list[Json]:
    """The objects in a namespace that have the labels of an installation."""
    chosen = ("-n", namespace, "-l", MADE_HERE)
    return items(kubectl("get", ",".join(kinds()), *chosen, "--show-managed-fields", "-o", "json"))


def as_it_is(plan: Plan) -> Plan:
    """Fill in quota, volume and settings from the cluster, where the plan does not set them."""

    def live(kind: str, name: str, part: str = "spec") -> Json:
        found = items(
            kubectl("get", kind, name, "-n", plan.namespace, "--ignore-not-found", "-o", "json")
        )
        return found[0].get(part, {}) if found else {}

    if not CONFIG_ENV.exists():  # a colleague may have installed from a checkout that has one
        found = live("configmap", "saev-config", "data")
        root = found.get("SAEV_ROOT", "")
        if plan.has_volume or root.startswith("/"):
            found.pop("SAEV_ROOT", None)  # the overlay sets it
        plan = plan._replace(settings=found)
    hard = live("resourcequota", "saev-gpus").get("hard", {})
    if plan.gpus is None and "requests.nvidia.com/gpu" in hard:
        plan = plan._replace(gpus=int(hard["requests.nvidia.com/gpu"]))
    claim = live("persistentvolumeclaim", "saev-data") if plan.has_volume else {}
    if claim:
        size = plan.size or claim["resources"]["requests"]["storage"]
        storage_class = plan.storage_class or claim.get("storageClassName", "")
        plan = plan._replace(size=size, storage_class=storage_class)
    return plan


def locate(plan: Plan) -> str:
    """The cluster and the namespace, in words.

    Raises:
        InstallError: the namespace does not exist.
        Unreachable: the cluster cannot be reached.
    """
    try:
        context = os.environ.get("KUBE_CONTEXT") or kubectl("config", "current-context").strip()
    except InstallError:
        context = "the cluster"  # a pod has no contexts
    try:
        kubectl("get", "namespace", plan.namespace, "-o", "name")
    except InstallError as error:
        if "NotFound" in str(error):
            raise InstallError(
                f"Namespace {plan.namespace!r} does not exist in {context}; use the namespace that "
                f"runs live in: Kubeflow Pipelines' own (single-user) or a profile's (multi-user)."
            ) from None
        if "orbidden" not in str(error):
            raise
    return f"{context}, namespace {plan.namespace}"


def advise(plan: Plan) -> None:
    """Say what is still missing, and what to do next."""
    if plan.overlay == "s3" and not _exists("secret", "saev-storage", plan.namespace):
        say(
            f"There is no Secret saev-storage. Unless pods get credentials by their service "
            f"account (IRSA), copy {shown(STORAGE_ENV)}.example to storage.env, edit it, and "
            f"install again."
        )
    if "explorer" in plan.components:
        secret = "saev-explorer-storage"
        if plan.overlay == "s3" and not _exists("secret", secret, plan.namespace):
            say(
                f"There is no Secret {secret}. Unless the explorer gets credentials by its service "
                f"account saev-explorer (IRSA), make it of keys that "
                "can only read: docs/cluster.md."
            )
        say("The explorer: make explorer")
    if "tensorboard" in plan.components:
        say(f"kubectl -n {plan.namespace} port-forward service/saev-tensorboard 6006")
    say("Next: make doctor")


def uninstall(plan: Plan, *, dry_run: bool, force: bool, delete_pvc: str) -> None:
    """Delete what is installed in the namespace, except data and cluster-wide objects.

    Raises:
        InstallError: runs still have pods, and `force` is not set.
    """
    where = locate(plan)
    running = _step_pods(plan.namespace)
    if running and not force:
        raise InstallError(
            f"{len(running)} pods of saev's runs are still there ({running[0]}, …). They would "
            f"lose their service account and network rules; cancel the runs, or set FORCE=1."
        )
    found = installed(plan.namespace)
    delete: list[Key] = []
    say(f"{where}:")
    for kind, name in sorted(map(key_of, found)):
        if kind == "PersistentVolumeClaim" and name != delete_pvc:
            say(f"  keep    {kind}/{name} (data; DELETE_PVC={name} deletes it)")
        else:
            say(f"  delete  {kind}/{name}")
            delete.append((kind, name))
    if not found:
        say("  nothing is installed")
    say("Not changed: the namespace and its labels, and cluster-wide objects (priority).")
    if dry_run:
        say("Nothing was changed (DRY_RUN).")
    elif delete:
        _delete(plan.namespace, delete)
        say("Done.")


def kinds() -> tuple[str, ...]:
    """The kinds of objects that an installation can have in this cluster."""
    served = kubectl("api-resources", f"--api-group={RUNTIME_GROUP}", "-o", "name")
    return (*KINDS, RUNTIME) if "trainingruntimes." in served else KINDS


def say(line: str) -> None:
    """Print one line."""
    sys.stdout.write(line + "\n")


def _live(text: str) -> str:
    return kubectl("get", "-f", "-", "-o", "json", "--ignore-not-found", stdin=text)


def _delete(namespace: str, found: list[Key]) -> None:
    if found:
        named = {"TrainingRuntime": RUNTIME}
        names = [f"{named.get(kind, kind.lower())}/{name}" for kind, name in found]
        kubectl("delete", "-n", namespace, "--ignore-not-found", "--wait=false", *names)


def _exists(kind: str, name: str, namespace: str) -> bool:
    return bool(
        kubectl("get", kind, name, "-n", namespace, "--ignore-not-found", "-o", "name").strip()
    )


def _step_pods(namespace: str) -> list[str]:
    selector = f"{PART_OF}=saev,app.kubernetes.io/component notin ({', '.join(SERVERS)})"
    text = kubectl("get", "pods", "-n", namespace, "-l", selector, "-o", "json")
    over = ("Succeeded", "Failed")
    pods = json.loads(text)["items"]
    return [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") not in over]


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("command", choices=("install", "uninstall", "render"))
    made.add_argument("--overlay", default="", help=f"where data is kept: {', '.join(OVERLAYS)}")
    system = os.environ.get("KFP_SYSTEM_NAMESPACE") or "kubeflow"
    runs = os.environ.get("KFP_NAMESPACE") or system
    made.add_argument("--namespace", default=runs, help="where runs live")
    made.add_argument("--kfp-namespace", default=system, help="where KFP itself runs")
    made.add_argument("--components", nargs="*", default=[], help=f"any of {', '.join(COMPONENTS)}")
    made.add_argument("--image", default="", help="saev's image, for the explorer and TensorBoard")
    made.add_argument("--gpus", type=int, help="most GPUs at once in the namespace")
    made.add_argument("--size", default="", help="size of the volume, such as 2Ti")
    made.add_argument("--storage-class", default="", help="storage class of the volume")
    made.add_argument("--dry-run", action="store_true", help="change nothing")
    made.add_argument("--prune", action="store_true", help="delete components that are not named")
    made.add_argument("--force", action="store_true", help="uninstall under running pods")
    made.add_argument("--delete-pvc", default="", help="name of the claim to delete with its data")
    return made


def main() -> int:
    """Run the command. Returns the exit status."""
    given = parser().parse_args()
    plan = Plan(
        given.overlay,
        given.namespace,
        tuple(dict.fromkeys(given.components)),
        given.kfp_namespace,
        given.image,
        given.gpus,
        given.size,
        given.storage_class,
    )
    try:
        if given.command == "render":
            check(plan)
            sys.stdout.write(render(plan))
        elif given.command == "install":
            install(plan, dry_run=given.dry_run, prune=given.prune)
        else:
            uninstall(plan, dry_run=given.dry_run, force=given.force, delete_pvc=given.delete_pvc)
    except InstallError as error:
        sys.stderr.write(f"error: {str(error).strip()}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
