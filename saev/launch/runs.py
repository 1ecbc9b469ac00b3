"""Lists, starts and retries runs of Kubeflow Pipelines, from a pod of its cluster.

The four requests are made with urllib3. The images have no `kfp`, because its client takes seconds
to import and pins other versions, and no `kfp-server-api`, because it has no wheel.
"""

import base64
import datetime
import json
import os
import typing as tp
import urllib.parse

import urllib3

from saev.errors import ClusterError
from saev.launch import cluster
from saev.launch.explain import AnswerError, LoginPageError, OtherServerError, Server, explained

AUDIENCE = "pipelines.kubeflow.org"
"""The audience that a token needs so that a multi-user KFP accepts it."""
OVER = frozenset({"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"})
"""The final states of a run or a task."""

_RUNS = "/apis/v2beta1/runs"
_PAGE = 100
_SECONDS = 30.0
_TOKEN_SECONDS = 3600


class Run(tp.NamedTuple):
    """The part of a run's record that a firing needs."""

    run_id: str
    name: str
    state: str
    """KFP's state, except that a canceled run is CANCELED. KFP calls it FAILED."""
    version: str
    """Id of the pipeline's version."""
    parameters: dict[str, tp.Any]
    ended_before: datetime.datetime | None
    """When it ended before its last retry; None if it was not retried."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended; somebody may retry it."""
        return self.state in OVER


class Runs(tp.Protocol):
    """The runs of one installation."""

    def get(self, run_id: str) -> Run | None:
        """The run with this id; None if there is none."""

    def named(self, name: str) -> list[Run]:
        """The runs with this name, newest first."""

    def unfinished(self) -> list[Run]:
        """Runs that are not over."""

    def start(self, name: str, description: str, parameters: dict[str, tp.Any]) -> str:
        """Start a run. Returns its id."""

    def retry(self, run_id: str) -> None:
        """Start those pods of a failed run again that did not succeed."""


class Target(tp.NamedTuple):
    """Which pipeline is started, and in which installation."""

    endpoint: str
    """URL of the API, inside the cluster."""
    experiment_id: str
    pipeline_id: str
    version_id: str
    service_account: str
    """Service account of the runs' pods."""


def ends(states: tp.Sequence[str]) -> list[int]:
    """Positions in a run's history of states where it ended before a retry."""
    before = states[:-1] if states and states[-1] in OVER else states
    return [i for i, state in enumerate(before) if state in OVER]


def was_canceled(states: tp.Sequence[str]) -> bool:
    """Whether a failed run was canceled. Only its history of states tells.

    Only the states after the last retry count.
    """
    earlier = ends(states)
    return "CANCELING" in states[earlier[-1] + 1 if earlier else 0 :]


class Kubeflow:
    """The runs of the installation that this pod belongs to.

    Args:
        target: which pipeline is started, and where.
    """

    def __init__(self, target: Target):
        self._target = target
        # A request that changes something is sent again only if no connection was made. If its
        # answer is lost, the caller first looks whether it took effect.
        self._again = urllib3.Retry(
            connect=4, read=4, status=4, other=0, redirect=0, backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False,
        )  # fmt: skip
        self._once = urllib3.Retry(
            connect=4, read=0, status=0, other=0, redirect=0, backoff_factor=0.5,
            allowed_methods=None, raise_on_status=False,
        )  # fmt: skip
        timeout = urllib3.Timeout(connect=10.0, read=_SECONDS)
        self._http = urllib3.PoolManager(timeout=timeout)
        self._server = _server(target.endpoint)
        self._headers: dict[str, str] = {}
        self._namespace: dict[str, str] = {}
        if self._send("GET", "/apis/v2beta1/healthz", "connect").get("multi_user"):
            namespace, token = _own_token()
            self._headers = {"authorization": f"Bearer {token}"}
            self._namespace = {"namespace": namespace}

    def get(self, run_id: str) -> Run | None:
        """See :class:`Runs`."""
        try:
            return _run(self._send("GET", f"{_RUNS}/{_quoted(run_id)}", f"look at run {run_id}"))
        except ClusterError as err:
            if err.status == 404:
                return None
            raise

    def named(self, name: str) -> list[Run]:
        """See :class:`Runs`."""
        return self._list([_predicate("EQUALS", "display_name", name)])

    def unfinished(self) -> list[Run]:
        """See :class:`Runs`."""
        return self._list([_predicate("NOT_EQUALS", "state", state) for state in sorted(OVER)])

    def start(self, name: str, description: str, parameters: dict[str, tp.Any]) -> str:
        """See :class:`Runs`."""
        target = self._target
        body = {
            "display_name": name,
            "description": description,
            "experiment_id": target.experiment_id,
            "pipeline_version_reference": {
                "pipeline_id": target.pipeline_id,
                "pipeline_version_id": target.version_id,
            },
            "runtime_config": {"parameters": parameters},
            "service_account": target.service_account,
        }
        return str(self._send("POST", _RUNS, f"start the run {name}", body=body)["run_id"])

    def retry(self, run_id: str) -> None:
        """See :class:`Runs`."""
        self._send("POST", f"{_RUNS}/{_quoted(run_id)}:retry", f"retry run {run_id}")

    def _list(self, predicates: list[dict[str, str]]) -> list[Run]:
        found: list[Run] = []
        query = {
            "page_size": str(_PAGE),
            "sort_by": "created_at desc",
            "filter": json.dumps({"predicates": predicates}),
            **self._namespace,
        }
        while True:
            answer = self._send("GET", _RUNS, "list runs", query=query)
            found += map(_run, answer.get("runs") or [])
            token = answer.get("next_page_token")
            if not token:
                return found
            query["page_token"] = token

    def _send(
        self,
        method: str,
        path: str,
        doing: str,
        *,
        query: dict[str, str] | None = None,
        body: tp.Any = None,
    ) -> dict[str, tp.Any]:
        with explained(self._server, doing):
            return _answer(
                self._http.request(
                    method,
                    self._target.endpoint + path,
                    fields=query if method == "GET" else None,
                    json=body,
                    headers=self._headers,
                    retries=self._again if method == "GET" else self._once,
                )
            )


def _answer(response: urllib3.BaseHTTPResponse) -> dict[str, tp.Any]:
    """The JSON of an API's answer. Raises exceptions that `explained` turns into a sentence."""
    if "html" in response.headers.get("content-type", ""):
        raise LoginPageError(response.geturl() or "")
    if response.status != 200 and response.status != 201:
        raise AnswerError(response.status, response.data)
    try:
        answer = json.loads(response.data)
    except ValueError as err:
        raise OtherServerError(response.geturl() or "") from err
    if not isinstance(answer, dict):
        raise OtherServerError(response.geturl() or "")
    return answer


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def _predicate(operation: str, key: str, value: str) -> dict[str, str]:
    return {"operation": operation, "key": key, "string_value": value}


def _run(raw: dict[str, tp.Any]) -> Run:
    """The run in the API's JSON."""
    history, state = raw.get("state_history") or [], raw.get("state") or "PENDING"
    states = [str(entry.get("state", "")) for entry in history]
    if state == "FAILED" and was_canceled(states):
        state = "CANCELED"
    earlier = ends(states)
    return Run(
        run_id=str(raw["run_id"]),
        name=str(raw.get("display_name", "")),
        state=state,
        version=str((raw.get("pipeline_version_reference") or {}).get("pipeline_version_id", "")),
        parameters=(raw.get("runtime_config") or {}).get("parameters") or {},
        ended_before=_time(history[earlier[-1]].get("update_time")) if earlier else None,
    )


def _time(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None


# --- Multi-user installations ---------------------------------------------------------------------


def _own_token() -> tuple[str, str]:
    """This pod's namespace, and a token of its service account that KFP accepts.

    KFP cannot mount a token for another audience into a pod, so the Kubernetes API is asked for
    one:
    https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-request-v1/
    """
    try:
        mounted = (cluster.ACCOUNT / "token").read_text(encoding="utf-8").strip()
        claims = mounted.split(".")[1]
        subject = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"]
        namespace, name = str(subject).split(":")[2:]
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise ClusterError(
            "This Kubeflow is multi-user, and the pod has no token of its service account "
            f"({err}). It needs one to ask for a token that Kubeflow accepts. Let the account "
            "saev-schedule mount its token.",
            status=403,
        ) from err
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    address = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    http = urllib3.PoolManager(
        ca_certs=str(cluster.ACCOUNT / "ca.crt"),
        timeout=urllib3.Timeout(connect=10.0, read=_SECONDS),
    )
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": [AUDIENCE], "expirationSeconds": _TOKEN_SECONDS},
    }
    server = Server(
        name="the Kubernetes API",
        address=address,
        who="The pod's token is not accepted; start it again.",
        allowed=f"`make install OVERLAY=… NAMESPACE={namespace}` gives {name} this permission.",
        found="Let network policies give the firings' pods a way to the Kubernetes API.",
        certificate="Check kube-root-ca.crt, the certificate that the pod trusts.",
        logs="the log of the API server",
    )
    with explained(server, f"ask for a token of service account {name}"):
        answer = _answer(
            http.request(
                "POST",
                f"{address}/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
                json=body,
                headers={"authorization": f"Bearer {mounted}"},
                retries=urllib3.Retry(total=4, backoff_factor=0.5, allowed_methods=None),
            )
        )
    return namespace, str(answer["status"]["token"])


def _server(endpoint: str) -> Server:
    return Server(
        name="Kubeflow Pipelines",
        address=endpoint,
        who="The token of the firing's service account is not accepted: check that Kubeflow's API "
        f"takes tokens for {AUDIENCE} (TOKEN_REVIEW_AUDIENCE).",
        allowed="`make install` gives the service account saev-schedule the permissions; "
        "`make schedule` makes the firings use it.",
        found="Check that the network policies let the firings' pods reach it (`make install`), "
        "and make the schedule again if Kubeflow has moved.",
        certificate="Check the certificate of Kubeflow's API.",
        logs="the log of its deployment ml-pipeline",
    )
