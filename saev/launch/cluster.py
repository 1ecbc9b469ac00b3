"""Requests to the Kubernetes API from inside a pod, with the official client.

A request that fails for a passing reason is sent again, for ten minutes. Objects are plain dicts,
because the client has no classes for some kinds.
"""

import contextlib
import functools
import json
import logging
import os
import typing as tp
from pathlib import Path

import tenacity

from saev.errors import LaunchError

if tp.TYPE_CHECKING:
    from kubernetes import client

logger = logging.getLogger(__name__)

Json = dict[str, tp.Any]

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds namespace, token and certificate of its service account."""
_TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and seconds between two bytes of an answer."""
_PATIENCE = 600.0
"""Seconds for which a request is sent again."""
_BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed. 409 is a conflict with another change."""


class Resource(tp.NamedTuple):
    """A kind of objects."""

    group: str
    version: str
    plural: str
    """The kind's name in URLs."""
    kind: str
    pod_label: str
    """Label of an object's pods. Its value is the object's name."""
    ends_first: bool = True
    """Whether deletion waits for the pods: a running object then goes after its pods. Otherwise it
    goes at once, and its pods follow."""
    makes: tuple["Resource", ...] = ()
    """The kinds of objects that its controller makes, under the same name, and that make the
    pods."""

    @property
    def api_version(self) -> str:
        """The value of `apiVersion` in manifests."""
        return f"{self.group}/{self.version}"


class Me(tp.NamedTuple):
    """The pod that this process runs in."""

    service_account: str
    owner: Json | None
    """Reference to the pod's owner, which is the run's Workflow. New objects get the same owner.
    None if the pod has no owner."""


class Cluster:
    """A namespace of a cluster.

    Args:
        api: a client with credentials.
        namespace: the namespace of all objects.
    """

    def __init__(self, api: "client.ApiClient", namespace: str):
        from kubernetes import client

        self.namespace = namespace
        self._pod = ""
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    @classmethod
    def of_this_pod(cls) -> tp.Self:
        """Connect to this pod's namespace as its service account.

        Raises:
            LaunchError: this process does not run in a pod.
        """
        from kubernetes import client, config

        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
            namespace = (ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        except (config.ConfigException, OSError) as err:
            raise LaunchError(
                'Pods are started (launch = "job", train_nodes) from a pod in Kubernetes with a '
                f"service account ({err}). Elsewhere, leave these at their defaults."
            ) from err
        configuration.connection_pool_maxsize = 256  # each log that is followed is a connection
        configuration.retries = 0
        return cls(client.ApiClient(configuration), namespace)

    def me(self, environ: tp.Mapping[str, str] | None = None) -> Me:
        """This pod's service account and owner. Raises LaunchError if the pod is not found."""
        environ = os.environ if environ is None else environ
        # The host name is the pod's name, except for names that are too long.
        self._pod = environ.get("KFP_POD_NAME") or environ.get("HOSTNAME", "")
        found = self._this_pod()
        if found is None:
            raise LaunchError(
                f"There is no pod {self._pod} in namespace {self.namespace}; expected this one."
            )
        owners = found["metadata"].get("ownerReferences", [])
        owner = next((o for o in owners if o.get("controller")), None)
        if owner is not None:
            # `blockOwnerDeletion` is left out: it needs the right to change the owner.
            owner = {key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}
        return Me(found["spec"].get("serviceAccountName", "default"), owner)

    def is_leaving(self) -> bool:
        """Whether this pod is being deleted, for example by an eviction; a new one replaces it.

        A canceled run stops its pods, but does not delete them.
        """
        pod = self._this_pod() if self._pod else None
        return pod is not None and "deletionTimestamp" in pod["metadata"]

    def _this_pod(self) -> Json | None:
        found = self._ask(
            f"get pod {self._pod}",
            lambda: self._core.read_namespaced_pod(
                self._pod, self.namespace, _preload_content=False, _request_timeout=_TIMEOUT
            ),
        )
        return None if found is None else tp.cast(Json, _parsed(found))

    def get(self, resource: Resource, name: str) -> Json | None:
        """An object; None if there is none."""
        found = self._ask(
            f"get {resource.plural}/{name}",
            lambda: self._custom.get_namespaced_custom_object(
                *self._place(resource), name, _request_timeout=_TIMEOUT
            ),
        )
        return tp.cast(Json | None, found)

    def listed(self, resource: Resource, labels: tp.Mapping[str, str]) -> list[Json]:
        """Objects with some labels; none where the cluster does not know the resource."""
        found = self._ask(
            f"list {resource.plural}",
            lambda: self._custom.list_namespaced_custom_object(
                *self._place(resource), label_selector=_selector(labels), _request_timeout=_TIMEOUT
            ),
        )
        return [] if found is None else tp.cast(list[Json], found["items"])

    def create(self, resource: Resource, manifest: Json) -> Json | None:
        """Make an object. Returns it, or None if an object of this name exists."""
        doing = f"create {resource.plural}/{manifest['metadata']['name']}"

        def create() -> Json | None:
            with _conflict_is_none():
                made = self._custom.create_namespaced_custom_object(
                    *self._place(resource), manifest, _request_timeout=_TIMEOUT
                )
                return tp.cast(Json, made)
            return None

        made = self._ask(doing, create, missing="refuse")
        return tp.cast(Json | None, made)

    def delete(self, resource: Resource, name: str, *, has_ended: bool = False) -> None:
        """Delete an object and ask its pods to end.

        :meth:`is_there` tells when the pods have ended.

        Args:
            resource: the object's kind.
            name: its name.
            has_ended: whether it is complete or has failed.
        """
        self._ask(
            f"delete {resource.plural}/{name}",
            lambda: self._custom.delete_namespaced_custom_object(
                *self._place(resource),
                name,
                propagation_policy=(
                    "Foreground" if has_ended or resource.ends_first else "Background"
                ),
                _request_timeout=_TIMEOUT,
            ),
        )

    def is_there(self, resource: Resource, name: str) -> bool:
        """Whether an object of this name exists, or something that it made."""
        return any(self.get(one, name) is not None for one in (resource, *resource.makes)) or (
            not resource.ends_first and bool(self.pods(f"{resource.pod_label}={name}"))
        )

    def wait(self, resource: Resource, found: Json, seconds: int) -> None:
        """Wait until an object changes, or for some seconds.

        Returns nothing and raises nothing, because the caller reads the object again anyway.

        Args:
            resource: the object's kind.
            found: the object as it was read last.
            seconds: the longest wait.
        """
        import urllib3.exceptions
        from kubernetes import client, watch

        name, version = found["metadata"]["name"], found["metadata"]["resourceVersion"]
        watching = watch.Watch()
        with contextlib.suppress(client.ApiException, urllib3.exceptions.HTTPError, ValueError):
            for _ in watching.stream(
                self._custom.list_namespaced_custom_object,
                *self._place(resource),
                field_selector=f"metadata.name={name}",
                resource_version=version,
                timeout_seconds=seconds,
                _request_timeout=(_TIMEOUT[0], seconds + 10.0),
            ):
                watching.stop()

    def pods(self, selector: str, phase: str = "") -> list[Json]:
        """Pods, oldest first.

        Args:
            selector: label selector.
            phase: condition on their phase, such as ``=Running`` or ``!=Succeeded``; "" takes all.
        """
        options = {"field_selector": f"status.phase{phase}"} if phase else {}
        found = self._ask(
            "list pods",
            lambda: self._core.list_namespaced_pod(
                self.namespace,
                label_selector=selector,
                _preload_content=False,
                _request_timeout=_TIMEOUT,
                **options,
            ),
        )
        items: list[Json] = [] if found is None else _parsed(found)["items"]
        return sorted(items, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def log(self, pod: str, container: str, **options: tp.Any) -> tp.Any:
        """A pod's log, as a response of urllib3 that can be streamed.

        The client's exceptions are passed on, because callers go on without the log.
        """
        return self._core.read_namespaced_pod_log(
            pod, self.namespace, container=container, _preload_content=False, **options
        )

    def _place(self, resource: Resource) -> tuple[str, str, str, str]:
        return resource.group, resource.version, self.namespace, resource.plural

    def _ask(
        self, doing: str, request: tp.Callable[[], tp.Any], missing: str = "none"
    ) -> tp.Any | None:
        """Send a request, repeatedly if needed.

        Args:
            doing: what the request does, for messages.
            request: sends it.
            missing: "none" if a 404 means None, anything else if it is an error.

        Returns:
            The answer; None for a 404.

        Raises:
            LaunchError: the API refuses, or does not answer.
        """
        import urllib3.exceptions
        from kubernetes import client

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passes),
            wait=tenacity.wait_random_exponential(multiplier=1.0, max=30.0),
            stop=tenacity.stop_after_delay(_PATIENCE),
            before_sleep=functools.partial(_say, doing),
            reraise=True,
        )
        try:
            return again(request)
        except client.ApiException as err:
            if err.status == 404 and missing == "none":
                return None
            raise self._refused(doing, err) from err
        except (urllib3.exceptions.HTTPError, OSError) as err:
            raise LaunchError(
                f"The Kubernetes API did not answer for {_PATIENCE / 60:.0f} minutes when asked to "
                f"{doing}: {err}.",
                passing=True,
            ) from err

    def _refused(self, doing: str, err: tp.Any) -> LaunchError:
        said = _message(err)
        text = f"The Kubernetes API refuses to {doing} in namespace {self.namespace}: {said}."
        if err.status in (401, 403):
            text += (
                " Whoever installed saev gives this right with `make install … COMPONENTS=jobs`, "
                'for launch = "job", or COMPONENTS=trainer, for train_nodes; without it, leave '
                "these at their defaults."
            )
        elif err.status == 404:
            text += " The cluster does not have what this needs (docs/pipeline.md, multi-node.md)."
        return LaunchError(text, passing=_passes(err))


def _passes(err: BaseException) -> bool:
    import urllib3.exceptions
    from kubernetes import client

    if isinstance(err, client.ApiException):
        # A quota has room again when other pods end.
        return err.status in _BUSY or (err.status == 403 and "exceeded quota" in _message(err))
    return isinstance(err, urllib3.exceptions.HTTPError | OSError)


def _say(doing: str, state: tenacity.RetryCallState) -> None:
    if state.attempt_number != 2:  # a single failure is not worth a message
        return
    err = state.outcome.exception() if state.outcome else None
    logger.warning("Still trying to %s: %s", doing, _message(err))


def _message(err: tp.Any) -> str:
    """The message in the API's answer, or the exception's own text."""
    try:
        text = str(json.loads(err.body)["message"])
    except (AttributeError, TypeError, ValueError, KeyError):
        status = getattr(err, "status", None)
        text = f"{status} {getattr(err, 'reason', '')}" if status else str(err)
    return " ".join(text.split()).rstrip(".")


@contextlib.contextmanager
def _conflict_is_none() -> tp.Iterator[None]:
    """Ignore status 409 of a creation: the object exists, which is no error."""
    from kubernetes import client

    try:
        yield
    except client.ApiException as err:
        if err.status != 409:
            raise


def _parsed(response: tp.Any) -> tp.Any:
    return json.loads(response.data)


def _selector(labels: tp.Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())
