"""Runs kubectl, and explains its errors."""

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
Key = tuple[str, str]
"""Kind and name of an object."""
_LOG_LINE = re.compile(r"[IWEF]\d{4} \d\d:")
"""How the lines begin that kubectl's libraries log, beside its own message."""
_UNREACHABLE = r"refused|no such host|i/o timeout|Unable to connect|current-context is not set"


class InstallError(Exception):
    """A mistake or a refusal, in one sentence with its remedy."""


class Unreachable(InstallError):
    """No cluster answers."""


def kubectl(*arguments: str, stdin: str | None = None, warnings: bool = False) -> str:
    """Run a kubectl command. Returns its standard output.

    Args:
        arguments: the command's words.
        stdin: its standard input.
        warnings: whether to pass on what it writes to standard error when it succeeds.

    Raises:
        Unreachable: no cluster answers.
        InstallError: kubectl is missing, or it fails; its own message is included.
    """
    if not shutil.which("kubectl"):
        raise InstallError("kubectl is not installed or not on PATH; install it.")
    context = os.environ.get("KUBE_CONTEXT")  # the client of `make submit` uses the same variable
    command = ["kubectl", *(["--context", context] if context else []), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    said = without_log_lines(done.stderr)
    if done.returncode:
        family = Unreachable if re.search(_UNREACHABLE, said) else InstallError
        raise family(f"{explain(said)}\n{said}".strip())
    if warnings and said:
        sys.stderr.write(f"{said}\n")
    return done.stdout


def without_log_lines(stderr: str) -> str:
    """What kubectl says, without the lines that its libraries log; those, if there is no more."""
    lines = [line for line in stderr.strip().splitlines() if not _LOG_LINE.match(line)]
    return ("\n".join(lines) or stderr.strip()).removeprefix("error: ")


def kustomize(folder: Path) -> str:
    """The objects that a kustomization makes, as YAML.

    The program kustomize is used where kubectl is missing.

    Raises:
        InstallError: the kustomization is wrong, or neither program is installed.
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
    """The remedy for an error of kubectl; "" for an unknown one."""
    known = {
        r"no matches for kind": "This cluster does not know a kind of object (a "
        "MutatingAdmissionPolicy needs Kubernetes 1.36, a TrainingRuntime Kubeflow Trainer 2.2): "
        "leave out the component that needs it.",
        r"conflict with|Apply failed with \d+ conflict": "Somebody else has set what this would "
        "change. Nothing was changed. Change it there, or leave out the component that has it.",
        r"is immutable|spec: Forbidden": "An existing object cannot be changed in this way. The "
        "message names it; delete it first, if nothing is lost by that.",
        r"Forbidden|forbidden": "You lack a permission; ask the cluster's administrator.",
        _UNREACHABLE: "The cluster cannot be reached; look at KUBECONFIG and `kubectl "
        "cluster-info`.",
        r"Unauthorized|must be logged in": "The cluster does not accept your credentials; log in.",
    }
    return next((text for pattern, text in known.items() if re.search(pattern, stderr)), "")


def items(text: str) -> list[Json]:
    """The objects in kubectl's JSON output, which may be empty, one object or a list."""
    if not text.strip():
        return []
    found = json.loads(text)
    return list(found["items"]) if found["kind"] == "List" else [found]


def key_of(item: Json) -> Key:
    """Kind and name."""
    return item["kind"], item["metadata"]["name"]


def meaning(item: Json) -> Json:
    """An object without status and without the metadata that the server adds."""
    server = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")
    metadata = {key: value for key, value in item["metadata"].items() if key not in server}
    return {**{key: value for key, value in item.items() if key != "status"}, "metadata": metadata}
