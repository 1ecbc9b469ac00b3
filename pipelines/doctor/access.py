"""Checks the permissions of the user and of the service accounts."""

import collections.abc
import typing as tp

from kubernetes import client

from pipelines.doctor.findings import Finding, fail, ok, warn
from pipelines.errors import ClusterError
from pipelines.kube import Kube


class Right(tp.NamedTuple):
    """A permission in Kubernetes."""

    verb: str
    resource: str
    """The resource with its subresource, such as pods/log."""
    group: str = ""
    name: str = ""
    """Name of the one object that the permission is for; "" means all objects."""

    def __str__(self) -> str:
        name = f"/{self.name}" if self.name else ""
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}{name}"


LOGS = (Right("list", "pods"), Right("get", "pods/log"))
FORWARD = (Right("get", "services"), Right("list", "pods"), Right("create", "pods/portforward"))
PROBE = (Right("create", "pods"), Right("get", "pods"), Right("delete", "pods"))
KFP = tuple(
    Right(verb, resource, "pipelines.kubeflow.org")
    for resource, verbs in {
        "pipelines": ("list", "create"),
        "experiments": ("list", "create"),
        "runs": ("list", "create", "terminate"),
        "jobs": ("list", "create", "disable", "delete"),
    }.items()
    for verb in verbs
)
"""Permissions that a multi-user KFP checks for its users."""
STEPS = (
    Right("create", "workflowtaskresults", "argoproj.io"),
    Right("patch", "workflowtaskresults", "argoproj.io"),
    Right("get", "pods"),
    Right("get", "configmaps", name="kfp-launcher"),
    Right("get", "secrets", name="mlpipeline-minio-artifact"),
)
"""Permissions that the pods of a run need; k8s/base/role.yaml explains them."""
STARTING = tuple(
    Right(verb, "runs", "pipelines.kubeflow.org") for verb in ("create", "get", "list", "retry")
)
"""Permissions that a multi-user KFP checks for the firings of schedules."""

_IDENTITIES = (
    "eks.amazonaws.com/role-arn", "iam.gke.io/gcp-service-account",
    "azure.workload.identity/client-id",
)  # fmt: skip
"""Annotations by which clouds give the pods of a service account access to storage."""


JOBS = (
    *(Right(verb, "jobs", "batch") for verb in ("create", "get", "list", "watch", "delete")),
    Right("list", "pods"),
    Right("get", "pods/log"),
)
"""Permissions that the pods also need with launch = "job"; k8s/components/jobs explains them."""


def permissions(
    kube: Kube, namespace: str, *, is_multi_user: bool, pod: bool
) -> collections.abc.Iterator[Finding]:
    """Whether the user has the permissions that each command needs."""
    settings = kube.settings
    wanted: list[tuple[str, str, tuple[Right, ...]]] = [("logs", namespace, LOGS)]
    if not settings.endpoint:
        wanted.append(("forwarding a port to KFP", settings.kfp_namespace, FORWARD))
    if is_multi_user:
        wanted.append(("submitting", namespace, KFP))
    if pod:
        wanted.append(("the doctor's pod", namespace, PROBE))
    for purpose, where, rights in wanted:
        what = f"your permissions for {purpose}"
        try:
            refused = [right for right in rights if not _may_i(kube, where, right)]
        except ClusterError as err:
            yield warn(what, str(err), "")
            continue
        if refused:
            remedy = "Ask the namespace's administrator for a Role with them."
            yield fail(what, f"missing in {where}: {', '.join(map(str, refused))}", remedy)
        else:
            yield ok(what, f"all {len(rights)} in {where}")


def service_account(
    kube: Kube, namespace: str, name: str, *, launches: bool = False
) -> collections.abc.Iterator[Finding]:
    """Whether the steps' service account exists and has its permissions.

    Args:
        kube: the cluster.
        namespace: the namespace of the runs.
        name: the account's name.
        launches: whether steps make Jobs.
    """
    what = f"service account {name}"
    try:
        if _account(kube, namespace, name) is None:
            yield fail(what, f"it does not exist in {namespace}", _install(namespace))
            return
    except ClusterError as err:
        yield warn(what, str(err), "")
        return
    wanted = (*STEPS, *JOBS) if launches else STEPS
    yield _rights(kube, namespace, name, wanted, "things that steps need")


def schedule_account(
    kube: Kube, namespace: str, *, is_multi_user: bool
) -> collections.abc.Iterator[Finding]:
    """The same for the service account of firings, and whether it can use the storage."""
    name = kube.settings.schedule_account
    what = f"service account {name}"
    try:
        found = _account(kube, namespace, name)
        steps = _account(kube, namespace, kube.settings.service_account)
    except ClusterError as err:
        yield warn(what, str(err), "")
        return
    if found is None:
        missing = f"it does not exist in {namespace}; only schedules need it"
        yield warn(what, missing, _install(namespace))
        return
    token = Right("create", "serviceaccounts/token", name=name)
    rights = (*STEPS, *STARTING, token) if is_multi_user else STEPS
    yield _rights(kube, namespace, name, rights, "things that firings of schedules need")
    theirs, ours = ((account and account.metadata.annotations) or {} for account in (steps, found))
    lacking = [key for key in _IDENTITIES if key in theirs and key not in ours]
    if lacking:
        yield fail(
            f"storage access of {name}",
            f"{kube.settings.service_account} has the annotation {lacking[0]}, {name} has not",
            f"`kubectl annotate serviceaccount -n {namespace} {name} "
            f"{lacking[0]}={theirs[lacking[0]]}`, and let the role trust it too (docs/cluster.md).",
        )


def _install(namespace: str) -> str:
    return f"`make install OVERLAY=… NAMESPACE={namespace}` makes it and its Role."


def _account(kube: Kube, namespace: str, name: str) -> tp.Any:
    """A service account; None if it does not exist. Raises ClusterError."""
    try:
        with kube.explained(f"look at service account {name}"):
            return kube.core.read_namespaced_service_account(name, namespace)
    except ClusterError as err:
        if err.status == 404:
            return None
        raise


def _rights(
    kube: Kube, namespace: str, name: str, wanted: tuple[Right, ...], purpose: str
) -> Finding:
    what = f"service account {name}"
    try:
        lacking = refused(kube, namespace, name, wanted)
    except ClusterError as err:
        if err.status == 403:
            return ok(what, "it exists; you may not ask what it is allowed to do")
        return warn(what, str(err), "")
    if not lacking:
        return ok(what, f"it exists and may do all {len(wanted)} {purpose}")
    remedy = _install(namespace)
    if set(lacking) <= set(JOBS):
        remedy = (
            f'launch = "job" needs this: `make install OVERLAY=… NAMESPACE={namespace} '
            'COMPONENTS="… jobs"` gives it; or leave launch at "loop".'
        )
    return fail(what, f"it may not {', '.join(map(str, lacking))}", remedy)


def refused(
    kube: Kube, namespace: str, account: str, rights: collections.abc.Iterable[Right]
) -> list[Right]:
    """The permissions that a service account lacks. Raises ClusterError if they cannot be asked."""
    return [right for right in rights if not _may_they(kube, namespace, account, right)]


def _attributes(namespace: str, right: Right) -> client.V1ResourceAttributes:
    resource, _, subresource = right.resource.partition("/")
    return client.V1ResourceAttributes(
        namespace=namespace,
        verb=right.verb,
        group=right.group,
        resource=resource,
        subresource=subresource or None,
        name=right.name or None,
    )


def _may_i(kube: Kube, namespace: str, right: Right) -> bool:
    body = client.V1SelfSubjectAccessReview(
        spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=_attributes(namespace, right))
    )
    with kube.explained("ask what you are allowed to do"):
        return bool(kube.authorization.create_self_subject_access_review(body).status.allowed)


def _may_they(kube: Kube, namespace: str, account: str, right: Right) -> bool:
    body = client.V1LocalSubjectAccessReview(
        metadata=client.V1ObjectMeta(namespace=namespace),
        spec=client.V1SubjectAccessReviewSpec(
            user=f"system:serviceaccount:{namespace}:{account}",
            groups=["system:serviceaccounts", f"system:serviceaccounts:{namespace}"],
            resource_attributes=_attributes(namespace, right),
        ),
    )
    with kube.explained("ask what the service account is allowed to do"):
        review = kube.authorization.create_namespaced_local_subject_access_review(namespace, body)
    return bool(review.status.allowed)
