"""A connection to the Kubernetes API, with the kubeconfig or from inside a pod."""

import contextlib
import os
import typing as tp
from pathlib import Path

import urllib3
import yaml
from kubernetes import client, config

from pipelines.settings import Settings
from saev.errors import ConfigError
from saev.launch.explain import Server, explained, understood


class _Client(client.ApiClient):
    """The Kubernetes client, with a time limit for each request that does not set its own."""

    seconds = 30.0

    def request(self, method: str, url: str, **kwargs: tp.Any) -> tp.Any:
        kwargs["_request_timeout"] = kwargs.get("_request_timeout") or (
            min(self.seconds, 10.0),
            self.seconds,
        )
        return super().request(method, url, **kwargs)

    def deserialize(self, response: tp.Any, response_type: tp.Any) -> tp.Any:
        with understood(response, self.configuration.host):
            return super().deserialize(response, response_type)


class Kube:
    """The API groups that the client uses."""

    def __init__(self, settings: Settings):
        """Read the configuration. Nothing is sent yet. Raises ConfigError."""
        self.settings = settings
        self.configuration = _configuration(settings)
        self.configuration.retries = urllib3.Retry(total=3, connect=0, read=0, status=0, other=0)
        api = self.new_client()
        self.core = client.CoreV1Api(api)
        self.apps = client.AppsV1Api(api)
        self.batch = client.BatchV1Api(api)
        self.custom = client.CustomObjectsApi(api)
        self.storage = client.StorageV1Api(api)
        self.authorization = client.AuthorizationV1Api(api)
        self.version = client.VersionApi(api)
        self.server = _server(settings, self.configuration.host)

    def new_client(self) -> client.ApiClient:
        """Another client with the same credentials."""
        api = _Client(self.configuration)
        api.seconds = self.settings.timeout
        return api

    def schemas(self, group_version: str) -> dict[str, tp.Any]:
        """The OpenAPI schemas of a group of the API, by their names.

        The client's exceptions are passed on: status 404 if the cluster does not serve the group.
        """
        api = self.custom.api_client
        found = api.call_api(
            f"/openapi/v3/apis/{group_version}",
            "GET",
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
            response_type="object",
            _return_http_data_only=True,
        )
        return tp.cast(dict[str, tp.Any], found["components"]["schemas"])

    def explained(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """See :func:`saev.launch.explain.explained`."""
        return explained(self.server, doing)


def _configuration(settings: Settings) -> tp.Any:
    configuration = client.Configuration()
    paths = [Path(part).expanduser() for part in settings.kubeconfig.split(os.pathsep) if part]
    if not paths:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            with contextlib.suppress(config.ConfigException):
                config.load_incluster_config(client_configuration=configuration)
                return configuration
        paths = [Path("~/.kube/config").expanduser()]
    if not any(path.is_file() for path in paths):
        remedy = (
            "Set KUBECONFIG to one: logs and the doctor need Kubernetes."
            if settings.endpoint
            else "Set KUBECONFIG to one, or KFP_ENDPOINT to reach Kubeflow Pipelines without it."
        )
        raise ConfigError(f"There is no kubeconfig at {', '.join(map(str, paths))}. {remedy}")
    files = os.pathsep.join(map(str, paths))
    try:
        config.load_kube_config(
            config_file=files, context=settings.context or None, client_configuration=configuration
        )
    except (config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError) as err:
        raise ConfigError(_bad_kubeconfig(files, settings.context, err)) from err
    return configuration


def _bad_kubeconfig(files: str, context: str, err: Exception) -> str:
    said = " ".join(str(err).split()).rstrip(".")
    if "contexts" in said or "current-context" in said:
        wanted = f"context {context!r}" if context else "current context"
        return (
            f"The kubeconfig {files} has no {wanted}. `kubectl config get-contexts` lists them; "
            "choose one with KUBE_CONTEXT or `kubectl config use-context`."
        )
    return f"The kubeconfig {files} cannot be used: {said}. Check it with `kubectl version`."


def _server(settings: Settings, address: str) -> Server:
    return Server(
        name="the Kubernetes API",
        address=address,
        who="Log in to the cluster again, until `kubectl auth whoami` works.",
        allowed="Ask the administrator of the cluster for this permission.",
        found="Check KUBECONFIG and KUBE_CONTEXT, until `kubectl version` works.",
        certificate="Check certificate-authority-data in the kubeconfig.",
        logs="the log of the API server",
    )
