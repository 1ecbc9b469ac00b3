"""Mistakes of users, and what a run says about them, side by side."""

import collections.abc
import re

from conformance.cluster import Cluster, with_settings
from conformance.jobs import Jobs, seconds
from conformance.table import Check, Failed, NotRun
from pipelines import prepare, steps
from pipelines.errors import ClusterError
from saev import storage

RUN_SECONDS = 900.0


def checks(cluster: Cluster) -> list[Check]:
    """All of them."""
    return [
        Check("mistake: corrupt image", lambda: _corrupt(cluster)),
        Check("mistake: empty prefix", lambda: _empty(cluster)),
        Check("mistake: missing bucket", lambda: _bucket(cluster)),
        Check("mistake: missing secret", lambda: _secret(cluster)),
    ]


def _corrupt(cluster: Cluster) -> str:
    jobs = Jobs(cluster, "corrupt")
    cluster.storage(jobs.dataset, "pictures", "0", "24")
    bad = storage.join(jobs.dataset, "class-0", "00004.png")
    cluster.storage(bad, "write", "this is no picture")
    return _fails(cluster, jobs, r"00004\.png.*skip_unreadable", kind="permanent")


def _empty(cluster: Cluster) -> str:
    jobs = Jobs(cluster, "empty")
    return _fails(cluster, jobs, re.escape(jobs.dataset), kind="permanent")


def _bucket(cluster: Cluster) -> str:
    if not cluster.root.startswith("s3://"):
        raise NotRun(f"the storage is {cluster.root.split(':')[0]}, which has no buckets")
    missing = f"s3://saev-conformance-{cluster.id}/out"
    jobs = Jobs(with_settings(cluster, root=missing), "bucket")
    return _fails(jobs.cluster, jobs, rf"{missing.split('/')[2]}.*(does not exist|bucket)")


def _secret(cluster: Cluster) -> str:
    name = prepare.pods(cluster.settings).storage_secret
    try:
        with cluster.kube.explained("look at the secret"):
            cluster.kube.core.read_namespaced_secret(name, cluster.namespace)
    except ClusterError as err:
        raise NotRun(f"pods have no secret {name}: {err}") from err
    jobs = Jobs(cluster, "secret")
    pairs = [f"storage_secret=saev-conformance-{cluster.id}"]
    return _fails(cluster, jobs, "credentials|AWS_ACCESS_KEY_ID", pairs=pairs)


def _fails(
    cluster: Cluster,
    jobs: Jobs,
    pattern: str,
    *,
    kind: str = "(permanent|passing)",
    pairs: collections.abc.Sequence[str] = (),
) -> str:
    """Submit a job that cannot succeed."""
    run_id = cluster.submit(jobs.name, jobs.dataset, jobs.config(), pairs=pairs)
    run = cluster.end(run_id, RUN_SECONDS)
    if steps.state_of(run) != "failed":
        raise Failed(f"the run came to {steps.state_of(run)}")
    line = cluster.last_word(run_id)
    if not re.search(f"^saev: {kind} error.*({pattern})", line):
        raise Failed(f"the log ends: {line or 'without a word'}", f"expected {pattern!r} in it")
    return f"failed after {seconds(run)}: {line}"
