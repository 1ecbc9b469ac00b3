"""kubectl, and what to do about what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import typing as tp
from pathlib import Path

Json = dict[str, tp.Any]


class InstallError(Exception):
    """A mistake or a refusal, in one sentence with its remedy."""


def kubectl(*arguments: str, stdin: str | None = None, warnings: bool = False) -> str:
    """Standard output of a kubectl command.

    Raises:
        InstallError: if it is missing or fails, with its own words.
    """
    if not shutil.which("kubectl"):
        raise InstallError("kubectl is not installed or not on PATH; install it.")
    context = os.environ.get("KUBE_CONTEXT")  # as the client's
    command = ["kubectl", *(["--context", context] if context else []), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError(f"{explain(done.stderr)}\n{done.stderr.strip()}")
    if warnings and done.stderr.strip():
        sys.stderr.write(done.stderr)
    return done.stdout


def kustomize(folder: Path) -> str:
    """The objects that a kustomization makes, as YAML; kustomize serves where kubectl is missing.

    Raises:
        InstallError: if the kustomization is wrong, or there is neither program.
    """
    if shutil.which("kubectl") or not shutil.which("kustomize"):
        return kubectl("kustomize", str(folder))
    done = subprocess.run(
        ["kustomize", "build", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InstallError(done.stderr.strip())
    return done.stdout


def explain(stderr: str) -> str:
    """What to do about what kubectl says."""
    known = {
        r"no matches for kind": "This cluster does not know a kind of object (a "
        "MutatingAdmissionPolicy needs Kubernetes 1.36, a TrainingRuntime Kubeflow Trainer 2.2): "
        "leave out the component that has it.",
        r"conflict with|Apply failed with \d+ conflict": "Somebody else has set what this would "
        "change; it is left as it is. Change it there, or leave out the component that has it.",
        r"is immutable|spec: Forbidden": "An existing object cannot be changed in this way; see "
        "which, and delete it first if nothing is lost by it.",
        r"Forbidden|forbidden": "You lack a permission; ask the cluster's administrator.",
        r"refused|no such host|i/o timeout|Unable to connect|current-context is not set": "The "
        "cluster cannot be reached; look at KUBECONFIG and `kubectl cluster-info`.",
        r"Unauthorized|must be logged in": "The cluster does not accept your credentials; log in.",
    }
    return next((text for pattern, text in known.items() if re.search(pattern, stderr)), "")


def items(text: str) -> list[Json]:
    """The objects in kubectl's JSON: one, a list, or none."""
    if not text.strip():
        return []
    found = json.loads(text)
    return list(found["items"]) if found["kind"] == "List" else [found]


def key_of(item: Json) -> tuple[str, str]:
    """Kind and name."""
    return item["kind"], item["metadata"]["name"]


def meaning(item: Json) -> Json:
    """An object without what the server keeps about it."""
    server = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")
    metadata = {key: value for key, value in item["metadata"].items() if key not in server}
    return {**{key: value for key, value in item.items() if key != "status"}, "metadata": metadata}
