"""The whole job on the other kind of storage: a volume that is made for it, and deleted."""

import collections.abc
import contextlib
import typing as tp

from kubernetes import client

from conformance.cluster import LABEL, Cluster, with_settings
from conformance.jobs import Jobs
from conformance.table import Check, Failed, NotRun
from pipelines.errors import ClusterError


def checks(cluster: Cluster) -> list[Check]:
    """One."""
    return [Check("volume: images to pages", lambda: _whole(cluster))]


def _whole(cluster: Cluster) -> str:
    if cluster.settings.storage == "pvc":
        raise NotRun("the checks above were on a volume; set up object storage for the other kind")
    with _claim(cluster) as name:
        values = {**cluster.settings.parameters, "pvc_name": name}
        other = with_settings(cluster, storage="pvc", root="/data/out", parameters=values)
        other.base = "/data"
        jobs = Jobs(other, "volume")
        return f"{jobs.whole()}; {jobs.results()}"


@contextlib.contextmanager
def _claim(cluster: Cluster) -> collections.abc.Iterator[str]:
    name = f"saev-conformance-{cluster.id}"
    mode = "ReadWriteOnce" if _nodes(cluster) == 1 else "ReadWriteMany"
    body = client.V1PersistentVolumeClaim(
        metadata=client.V1ObjectMeta(name=name, labels={LABEL: cluster.id}),
        spec=client.V1PersistentVolumeClaimSpec(
            access_modes=[mode],
            resources=client.V1VolumeResourceRequirements(requests={"storage": "1Gi"}),
        ),
    )
    core, namespace = cluster.kube.core, cluster.namespace
    with cluster.kube.explained("make a claim"):
        core.create_namespaced_persistent_volume_claim(namespace, body)
    try:
        yield name
    except Failed as err:
        phase = _phase(cluster, name)
        if phase == "Pending":
            raise NotRun(f"no storage class gives a volume for {mode}") from err
        if "permission denied" in err.found:
            remedy = "Its top folder has to be writable for group 0: docs/cluster.md, last section."
            raise Failed(err.found, remedy) from err
        raise
    finally:
        with contextlib.suppress(ClusterError), cluster.kube.explained("delete the claim"):
            core.delete_namespaced_persistent_volume_claim(name, namespace)


def _nodes(cluster: Cluster) -> int:
    with contextlib.suppress(ClusterError), cluster.kube.explained("list nodes"):
        return len(cluster.kube.core.list_node().items)
    return 0


def _phase(cluster: Cluster, name: str) -> tp.Any:
    with cluster.kube.explained("look at the claim"):
        claim = cluster.kube.core.read_namespaced_persistent_volume_claim(name, cluster.namespace)
    return claim.status.phase
