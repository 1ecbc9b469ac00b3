"""Requests to the Kubernetes API from inside a pod, with the official client.

A request that fails for a reason that may pass is made again, for ten minutes. Objects are plain
dicts, as their manifests are, so that kinds which the client has no class for are no exception.
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
"""Seconds to connect, and between two bytes of an answer."""
_PATIENCE = 600.0
_BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed. 409 is a conflict with somebody's change."""


class Resource(tp.NamedTuple):
    """A kind of objects."""

    group: str
    version: str
    plural: str
    """As in URLs."""
    kind: str
    pod_label: str
    """Label of the pods of an object, whose value is the object's name."""
    ends_first: bool = True
    """Whether a running object is deleted after its pods have ended; else it is deleted at once,
    and what it has made afterwards."""
    makes: tuple["Resource", ...] = ()
    """What its controller makes, of the same name, to make pods of it."""

    @property
    def api_version(self) -> str:
        """As in manifests."""
        return f"{self.group}/{self.version}"


class Me(tp.NamedTuple):
    """The pod that this process runs in."""

    service_account: str
    owner: Json | None
    """Reference to what the pod belongs to, the run's Workflow, for what belongs to it as well.
    None for a pod of its own."""


class Cluster:
    """A namespace of a cluster.

    Args:
        api: a client with credentials.
        namespace: of everything.
    """

    def __init__(self, api: "client.ApiClient", namespace: str):
        from kubernetes import client

        self.namespace = namespace
        self._pod = ""
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    @classmethod
    def of_this_pod(cls) -> tp.Self:
        """The namespace of this pod, as its service account. Raises LaunchError outside of pods."""
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
        configuration.connection_pool_maxsize = 256  # a log is a connection
        configuration.retries = 0
        return cls(client.ApiClient(configuration), namespace)

    def me(self, environ: tp.Mapping[str, str] | None = None) -> Me:
        """Whom this pod belongs to. Raises LaunchError if the API does not say."""
        environ = os.environ if environ is None else environ
        # A host name is the pod's name, but for long ones.
        self._pod = environ.get("KFP_POD_NAME") or environ.get("HOSTNAME", "")
        found = self._this_pod()
        if found is None:
            raise LaunchError(
                f"There is no pod {self._pod} in namespace {self.namespace}; expected this one."
            )
        owners = found["metadata"].get("ownerReferences", [])
        owner = next((o for o in owners if o.get("controller")), None)
        if owner is not None:
            # To block its deletion would need a right to change it.
            owner = {key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}
        return Me(found["spec"].get("serviceAccountName", "default"), owner)

    def is_leaving(self) -> bool:
        """Whether this pod is being deleted, as by an eviction, so that another one comes.

        A run that is canceled stops its pods and does not delete them.
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
        """Make an object. Returns it; None if one of its name was there."""
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
        """Delete an object, whose pods are asked to end now; :meth:`is_there` tells of their end.

        Args:
            resource: its kind.
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
        """Whether there still is an object of this name, or what it has made."""
        return any(self.get(one, name) is not None for one in (resource, *resource.makes)) or (
            not resource.ends_first and bool(self.pods(f"{resource.pod_label}={name}"))
        )

    def wait(self, resource: Resource, found: Json, seconds: int) -> None:
        """Return when an object is no longer what was found, or after some seconds.

        Says nothing and raises nothing: who waits looks at the object again anyway.
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
            selector: of their labels.
            phase: such as ``=Running`` or ``!=Succeeded``; empty means all.
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
        """A pod's log as urllib3's response, which may be read bit by bit.

        Raises whatever the client does: who reads logs has to go on without them.
        """
        return self._core.read_namespaced_pod_log(
            pod, self.namespace, container=container, _preload_content=False, **options
        )

    def _place(self, resource: Resource) -> tuple[str, str, str, str]:
        return resource.group, resource.version, self.namespace, resource.plural

    def _ask(
        self, doing: str, request: tp.Callable[[], tp.Any], missing: str = "none"
    ) -> tp.Any | None:
        """A request's answer; None if there is no such thing. Raises LaunchError."""
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
        # A quota has room again when others end.
        return err.status in _BUSY or (err.status == 403 and "exceeded quota" in _message(err))
    return isinstance(err, urllib3.exceptions.HTTPError | OSError)


def _say(doing: str, state: tenacity.RetryCallState) -> None:
    if state.attempt_number != 2:  # the first failure is nothing special
        return
    err = state.outcome.exception() if state.outcome else None
    logger.warning("Still trying to %s: %s", doing, _message(err))


def _message(err: tp.Any) -> str:
    """What the API says about a failure."""
    try:
        text = str(json.loads(err.body)["message"])
    except (AttributeError, TypeError, ValueError, KeyError):
        status = getattr(err, "status", None)
        text = f"{status} {getattr(err, 'reason', '')}" if status else str(err)
    return " ".join(text.split()).rstrip(".")


@contextlib.contextmanager
def _conflict_is_none() -> tp.Iterator[None]:
    """409 of a creation says that the object is there, which is no fault."""
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
