"""A connection to the API of Kubeflow Pipelines.

The generated client `kfp_server_api` is used directly. `kfp.Client` (2.17) has no time limits,
retries a failed health check for 25 seconds with tracebacks, prints to standard output, and stores
namespaces in the user's home.
"""

import collections.abc
import contextlib
import os
import typing as tp
import urllib.parse
import urllib.request
from pathlib import Path

import kfp_server_api
import urllib3

from pipelines import forward
from pipelines.kube import Kube
from pipelines.settings import Settings
from saev.errors import ConfigError
from saev.launch.explain import LoginPageError, Server, explained, understood

# KFP documents this path for the token that a pod mounts.
POD_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
API_PORT = 8888
FORWARDED_UI = "http://localhost:8080"


class _Client(kfp_server_api.ApiClient):
    """The generated client, with a time limit for each request and an error for login pages."""

    def __init__(self, configuration: tp.Any, seconds: float, **kwargs: tp.Any):
        super().__init__(configuration, **kwargs)
        self._seconds = seconds

    def request(self, method: str, url: str, **kwargs: tp.Any) -> tp.Any:
        kwargs["_request_timeout"] = (min(self._seconds, 10.0), self._seconds)
        response = super().request(method, url, **kwargs)
        if "html" in (response.getheader("content-type") or ""):
            raise LoginPageError(url)
        return response

    def deserialize(self, response: tp.Any, response_type: tp.Any) -> tp.Any:
        with understood(response, self.configuration.host):
            return super().deserialize(response, response_type)


class Kfp:
    """The API's services, and facts about the installation."""

    def __init__(self, settings: Settings, address: str, ui: str, bearer: str, shown: str):
        configuration = kfp_server_api.Configuration(host=address)
        # Redirects to a login page are followed. Other failures are reported at once.
        configuration.retries = urllib3.Retry(total=5, connect=0, read=0, status=0, other=0)
        configuration.ssl_ca_cert = _ca_file(settings)
        configuration.proxy = _proxy(address)
        if bearer:
            configuration.api_key["authorization"] = bearer
            configuration.api_key_prefix["authorization"] = "Bearer"
            configuration.refresh_api_key_hook = _refresh(settings)
        client = _Client(configuration, settings.timeout, cookie=settings.cookies or None)
        if settings.user:
            client.set_default_header("kubeflow-userid", settings.user)
        self.runs = kfp_server_api.RunServiceApi(client)
        self.experiments = kfp_server_api.ExperimentServiceApi(client)
        self.recurring = kfp_server_api.RecurringRunServiceApi(client)
        self.pipelines = kfp_server_api.PipelineServiceApi(client)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(client)
        self.health = kfp_server_api.HealthzServiceApi(client)
        self.settings, self.ui = settings, ui
        self.multi_user = False
        self.server = _server(settings, shown)

    def explained(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """See :func:`saev.launch.explain.explained`."""
        return explained(self.server, doing)

    def check(self) -> None:
        """Connect, and find out whether KFP is multi-user. Raises ClusterError or ConfigError."""
        with self.explained("connect"):
            self.multi_user = bool(self.health.healthz_service_get_healthz().multi_user)
        if self.multi_user and not self.settings.namespace:
            raise ConfigError(
                f"Kubeflow Pipelines at {self.server.address} is multi-user, and no namespace is "
                "set. Set KFP_NAMESPACE to that of your profile."
            )

    def text(self, path: str) -> str:
        """The API's answer at a path that the generated client does not know."""
        api = self.runs.api_client
        with contextlib.suppress(UnicodeDecodeError):  # the client decodes all answers as UTF-8
            api.call_api(path, "GET", auth_settings=["Bearer"])
        data = api.last_response.data
        return data if isinstance(data, str) else data.decode("utf-8", "replace")

    def pages(
        self, doing: str, fetch: collections.abc.Callable[[str], tp.Any]
    ) -> collections.abc.Iterator[tp.Any]:
        """The pages of a list.

        Args:
            doing: what the requests are for, such as "list runs"; errors contain it.
            fetch: requests the page of a token; "" is the first page.
        """
        token = ""
        while True:
            with self.explained(doing):
                answer = fetch(token)
            yield answer
            token = answer.next_page_token or ""
            if not token:
                return

    @property
    def in_namespace(self) -> dict[str, str]:
        """Keyword arguments for requests about a namespace. A single-user API takes none."""
        return {"namespace": self.settings.namespace} if self.multi_user else {}

    @property
    def pods(self) -> str:
        """Namespace of the runs' pods. A single-user KFP runs them in its own namespace."""
        return self.settings.namespace if self.multi_user else self.settings.kfp_namespace

    def run_url(self, run_id: str) -> str:
        """The address of a run in the UI."""
        return f"{self.ui}/#/runs/details/{run_id}"

    @property
    def hint(self) -> str:
        """The command that makes :meth:`run_url` work; "" if it works without one."""
        if self.ui != FORWARDED_UI:
            return ""
        namespace = self.settings.kfp_namespace
        return f"kubectl port-forward -n {namespace} service/ml-pipeline-ui 8080:80"


@contextlib.contextmanager
def connect(settings: Settings) -> collections.abc.Iterator[Kfp]:
    """Connect as the settings say, and check that the API answers.

    An endpoint of the settings is used unchanged. Without one, a pod uses the service inside its
    cluster. Any other machine forwards a port with its kubeconfig until the block ends.

    Raises:
        ClusterError: the API cannot be reached, or refuses the user.
        ConfigError: a file of the settings is missing, or the namespace is not set.
    """
    with contextlib.ExitStack() as stack:
        kfp = _open(settings, stack)
        kfp.check()
        yield kfp


def _open(settings: Settings, stack: contextlib.ExitStack) -> Kfp:
    bearer = settings.bearer_token()
    if settings.endpoint:
        ui = settings.ui or settings.endpoint
        return Kfp(settings, settings.endpoint, ui, bearer, settings.endpoint)
    if is_in_cluster():
        if not bearer and Path(POD_TOKEN).exists():
            settings = settings.model_copy(update={"token_file": POD_TOKEN})
            bearer = settings.bearer_token()
        address = f"http://ml-pipeline.{settings.kfp_namespace}.svc.cluster.local:{API_PORT}"
        return Kfp(settings, address, settings.ui or FORWARDED_UI, bearer, address)
    kube = Kube(settings)
    address = stack.enter_context(forward.to_service(kube, forward.kfp(kube, API_PORT)))
    shown = f"service/ml-pipeline in namespace {settings.kfp_namespace} of {kube.server.address}"
    return Kfp(settings, address, settings.ui or FORWARDED_UI, bearer, shown)


def in_cluster(settings: Settings) -> str:
    """URL of the API for pods of the same cluster. It works for any domain of the cluster."""
    return f"http://ml-pipeline.{settings.kfp_namespace}:{API_PORT}"


def is_in_cluster() -> bool:
    """Whether this process runs in a pod that has a service account."""
    token = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and token.exists()


def _refresh(settings: Settings) -> tp.Callable[[tp.Any], None]:
    """A hook that reads the token again, because it may be replaced before it expires."""

    def hook(configuration: tp.Any) -> None:
        configuration.api_key["authorization"] = settings.bearer_token()

    return hook


def _proxy(address: str) -> str | None:
    """The proxy of the environment for an address. The generated client ignores the environment."""
    parts = urllib.parse.urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or "") or parts.hostname in (
        "127.0.0.1",
        "localhost",
    ):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _ca_file(settings: Settings) -> str | None:
    if not settings.ca_file:
        return None
    path = Path(settings.ca_file).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"The certificates {settings.ca_file} do not exist. Check KFP_CA_FILE (ca_file)."
        )
    return str(path)


def _server(settings: Settings, shown: str) -> Server:
    namespace = settings.namespace or "NAMESPACE"
    if settings.endpoint:
        found = (
            "Check KFP_ENDPOINT: it is the address before /apis, such as "
            "https://kubeflow.example.com/pipeline."
        )
    else:
        found = (
            f"Check that Kubeflow Pipelines runs in namespace {settings.kfp_namespace} "
            "(KFP_SYSTEM_NAMESPACE), or set KFP_ENDPOINT."
        )
    has_token = bool(settings.token or settings.token_file)
    who = (
        "Your token was not accepted: make a new one, with "
        if has_token
        else "Set KFP_COOKIES to the cookies of a browser that is logged in, or KFP_TOKEN to "
    )
    who += (
        f"`kubectl create token default-editor -n {namespace} --audience=pipelines.kubeflow.org`."
    )
    return Server(
        name="Kubeflow Pipelines",
        address=shown,
        who=who,
        allowed=(
            f"Set KFP_NAMESPACE to a namespace of yours (now: {settings.namespace or 'none'}), or "
            "ask its owner for the role kubeflow-edit."
        ),
        found=found,
        certificate="Set KFP_CA_FILE to the certificate (PEM) of the authority that signed it.",
        logs=f"`kubectl logs -n {settings.kfp_namespace} deployment/ml-pipeline`",
    )
