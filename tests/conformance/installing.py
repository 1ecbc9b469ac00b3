"""`make install` and `make uninstall` in a namespace of their own, which is deleted."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from kubernetes import client

from conformance.cluster import LABEL, Cluster
from conformance.table import Check, Failed, NotRun
from pipelines.errors import ClusterError

INSTALL = Path(__file__).parents[2] / "k8s" / "install.py"
KINDS = (
    "deployments,services,networkpolicies,resourcequotas,limitranges,rolebindings,roles,"
    "serviceaccounts,configmaps,secrets,persistentvolumeclaims"
)
PART_OF = "app.kubernetes.io/part-of=saev"


class Installing:
    """One namespace."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.namespace = f"saev-conformance-{cluster.id}"

    def check(self) -> str:
        """Install twice, uninstall, and look at what is left."""
        if not shutil.which("kubectl"):
            raise NotRun("kubectl is not on the PATH")
        core = self.cluster.kube.core
        metadata = client.V1ObjectMeta(name=self.namespace, labels={LABEL: self.cluster.id})
        try:
            with self.cluster.kube.explained("make a namespace"):
                core.create_namespace(client.V1Namespace(metadata=metadata))
        except ClusterError as err:
            raise NotRun(str(err)) from err
        try:
            return self._installed()
        finally:
            with contextlib.suppress(ClusterError), self.cluster.kube.explained("delete it"):
                core.delete_namespace(self.namespace)

    def _installed(self) -> str:
        self._run("install", "--overlay", "local", "--size", "1Gi", "--components", "dedicated")
        made = self._objects()
        again = self._run("install", "--overlay", "local", "--components", "dedicated")
        lines = [line.strip() for line in again.splitlines()]
        changed = [line for line in lines if line.startswith(("create ", "change "))]
        if changed:
            raise Failed(f"a second install changes {', '.join(changed)}")
        self._run("uninstall")
        left = self.cluster.until(
            60, "more than data was left",
            lambda: found if (found := self._objects()) <= {"persistentvolumeclaim/saev-data"}
            else None,
        )  # fmt: skip
        if not left:
            raise Failed("uninstall deleted the claim with the data, which nobody asked for")
        self._run("uninstall", "--delete-pvc", "saev-data")
        self.cluster.until(60, "the claim was left", lambda: not self._objects() or None)
        return f"{len(made)} objects; a second time changes none; uninstall leaves the data's claim"

    def _objects(self) -> set[str]:
        text = self._kubectl("get", KINDS, "-n", self.namespace, "-l", PART_OF, "-o", "name")
        return {line.replace(".apps", "").split("/")[0].split(".")[0] + "/" + line.split("/")[1]
                for line in text.split()}  # fmt: skip

    def _run(self, *words: str) -> str:
        return self._command([sys.executable, str(INSTALL), *words, "--namespace", self.namespace])

    def _kubectl(self, *words: str) -> str:
        return self._command(["kubectl", *words])

    def _command(self, words: list[str]) -> str:
        settings = self.cluster.settings
        env = {**os.environ, "KFP_SYSTEM_NAMESPACE": settings.kfp_namespace}
        env |= {"KUBECONFIG": settings.kubeconfig} if settings.kubeconfig else {}
        env |= {"KUBE_CONTEXT": settings.context} if settings.context else {}
        done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            raise Failed(f"{' '.join(words[1:3])}: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout


def checks(cluster: Cluster) -> list[Check]:
    """One."""
    return [Check("install and uninstall", Installing(cluster).check)]
