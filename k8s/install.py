#!/usr/bin/env python3
"""Installs and uninstalls saev's part of a cluster: `make install`, `make uninstall`.

Needs kubectl and Python's standard library only. Nothing is changed before the API server has
accepted all of it in a dry run; nothing that somebody else made is taken over; data is deleted only
when its claim is named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from kubectl import InstallError, Json, items, key_of, kubectl, meaning
from manifests import COMPONENTS, CONFIG_ENV, OVERLAYS, STORAGE_ENV, Plan, check, render, shown

MANAGER = "saev-install"
PART_OF = "app.kubernetes.io/part-of"
_MADE_HERE = (f"{PART_OF}=saev", "app.kubernetes.io/managed-by=kustomize")
MADE_HERE = ",".join(_MADE_HERE)
DATA = ("PersistentVolumeClaim", "Secret")
"""Kinds that only a person deletes by name: files, and keys that may be nowhere else."""
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
"""Of all that install makes in a namespace."""
RUNTIME_GROUP = "trainer.kubeflow.org"
RUNTIME = f"trainingruntime.{RUNTIME_GROUP}"
"""The same, in clusters that have Kubeflow Trainer."""


def install(plan: Plan, *, dry_run: bool) -> None:
    """Dry run, say what changes, apply."""
    check(plan)
    where = locate(plan)
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
    left = left_behind(plan, {key_of(item) for item in accepted})
    for kind, name in left:
        say(f"  delete  {kind}/{name} (of another overlay)")
    if dry_run:
        say("Nothing was changed (DRY_RUN).")
        return
    kubectl(*apply, stdin=text)
    _delete(plan.namespace, left)
    say("Done.")
    advise(plan)


def left_behind(plan: Plan, wanted: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """What an installation with another overlay made, and this one does without. No data.

    Components that are not named stay: leaving one out by mistake must not open a namespace.
    """
    found = set()
    for overlay in OVERLAYS:
        if overlay == plan.overlay:
            continue
        other = Plan(overlay, plan.namespace, (), plan.kfp_namespace, "", None, "", "")
        for item in items(_live(render(other))):
            labels = item["metadata"].get("labels", {})
            is_ours = all(labels.get(k) == v for k, _, v in (p.partition("=") for p in _MADE_HERE))
            if is_ours and item["kind"] not in DATA:
                found.add(key_of(item))
    return sorted(found - wanted)


def as_it_is(plan: Plan) -> Plan:
    """The plan, with what it does not say of quota, volume and settings as the cluster has it."""

    def live(kind: str, name: str, part: str = "spec") -> Json:
        found = items(
            kubectl("get", kind, name, "-n", plan.namespace, "--ignore-not-found", "-o", "json")
        )
        return found[0].get(part, {}) if found else {}

    if not CONFIG_ENV.exists():  # of this checkout: a colleague's may have one
        found = live("configmap", "saev-config", "data")
        root = found.get("SAEV_ROOT", "")
        if plan.has_volume or root.startswith("/"):
            found.pop("SAEV_ROOT", None)  # the overlay knows where data is
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
    """Which cluster and namespace, in words.

    Raises:
        InstallError: if the namespace does not exist.
    """
    try:
        context = os.environ.get("KUBE_CONTEXT") or kubectl("config", "current-context").strip()
    except InstallError:
        context = "the cluster"  # of a pod, which has no contexts
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
    """What is still missing."""
    if plan.overlay == "s3" and not _exists("secret", "saev-storage", plan.namespace):
        say(
            f"There is no Secret saev-storage. Unless pods get credentials by their service "
            f"account (IRSA), copy {shown(STORAGE_ENV)}.example to storage.env, edit it, and "
            f"install again."
        )
    if "tensorboard" in plan.components:
        say(f"kubectl -n {plan.namespace} port-forward service/saev-tensorboard 6006")
    say("Next: make doctor")


def uninstall(plan: Plan, *, dry_run: bool, force: bool, delete_pvc: str) -> None:
    """Delete what install made in the namespace, except data and what is cluster-wide.

    Raises:
        InstallError: while runs have pods, unless forced.
    """
    where = locate(plan)
    running = _step_pods(plan.namespace)
    if running and not force:
        raise InstallError(
            f"{len(running)} pods of saev's runs are still there ({running[0]}, …), and would be "
            f"left without service account and network rules; cancel the runs, or set FORCE=1."
        )
    found = items(
        kubectl("get", ",".join(kinds()), "-n", plan.namespace, "-l", MADE_HERE, "-o", "json")
    )
    delete: list[tuple[str, str]] = []
    say(f"{where}:")
    for kind, name in sorted(map(key_of, found)):
        if kind == "PersistentVolumeClaim" and name != delete_pvc:
            say(f"  keep    {kind}/{name} (data; DELETE_PVC={name} deletes it)")
        else:
            say(f"  delete  {kind}/{name}")
            delete.append((kind, name))
    if not found:
        say("  nothing is installed")
    say("Left as they are: the namespace and its labels, and what is cluster-wide (priority).")
    if dry_run:
        say("Nothing was changed (DRY_RUN).")
    elif delete:
        _delete(plan.namespace, delete)
        say("Done.")


def kinds() -> tuple[str, ...]:
    """Of what may have been made in a namespace of this cluster."""
    served = kubectl("api-resources", f"--api-group={RUNTIME_GROUP}", "-o", "name")
    return (*KINDS, RUNTIME) if "trainingruntimes." in served else KINDS


def say(line: str) -> None:
    """One line for the reader."""
    sys.stdout.write(line + "\n")


def _live(text: str) -> str:
    return kubectl("get", "-f", "-", "-o", "json", "--ignore-not-found", stdin=text)


def _delete(namespace: str, found: list[tuple[str, str]]) -> None:
    if found:
        named = {"TrainingRuntime": RUNTIME}
        names = [f"{named.get(kind, kind.lower())}/{name}" for kind, name in found]
        kubectl("delete", "-n", namespace, "--ignore-not-found", "--wait=false", *names)


def _exists(kind: str, name: str, namespace: str) -> bool:
    return bool(
        kubectl("get", kind, name, "-n", namespace, "--ignore-not-found", "-o", "name").strip()
    )


def _step_pods(namespace: str) -> list[str]:
    selector = f"{PART_OF}=saev,app.kubernetes.io/component!=tensorboard"
    text = kubectl("get", "pods", "-n", namespace, "-l", selector, "-o", "json")
    over = ("Succeeded", "Failed")
    pods = json.loads(text)["items"]
    return [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") not in over]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("command", choices=("install", "uninstall", "render"))
    made.add_argument("--overlay", default="", help=f"where data is kept: {', '.join(OVERLAYS)}")
    system = os.environ.get("KFP_SYSTEM_NAMESPACE") or "kubeflow"
    runs = os.environ.get("KFP_NAMESPACE") or system
    made.add_argument("--namespace", default=runs, help="where runs live")
    made.add_argument("--kfp-namespace", default=system, help="where KFP itself runs")
    made.add_argument("--components", nargs="*", default=[], help=f"any of {', '.join(COMPONENTS)}")
    made.add_argument("--image", default="", help="saev's image, for TensorBoard")
    made.add_argument("--gpus", type=int, help="most GPUs at once in the namespace")
    made.add_argument("--size", default="", help="size of the volume, such as 2Ti")
    made.add_argument("--storage-class", default="", help="storage class of the volume")
    made.add_argument("--dry-run", action="store_true", help="change nothing")
    made.add_argument("--force", action="store_true", help="uninstall under running pods")
    made.add_argument("--delete-pvc", default="", help="name of the claim to delete with its data")
    return made


def main() -> int:
    """Exit status."""
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
            install(plan, dry_run=given.dry_run)
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
