"""Which cluster it is: versions of Kubernetes, KFP and cgroup."""

import collections.abc

from conformance.cluster import Cluster
from pipelines import doctor


def lines(cluster: Cluster) -> collections.abc.Iterator[str]:
    """What stands above the table."""
    with cluster.kube.explained("read the version"):
        kubernetes = cluster.kube.version.get_code().git_version.removeprefix("v")
    kfp = doctor._version(cluster.kube, cluster.settings.kfp_namespace) or "unknown"
    mode = "multi-user" if cluster.kfp.multi_user else "single-user"
    cgroup = cluster.python("cgroup")
    yield f"Kubernetes {kubernetes}, KFP {kfp} ({mode}), cgroup {cgroup}, "
    yield f"images {cluster.settings.image}, {cluster.settings.cpu_image}"
