"""The client's settings, from flags, then the environment, then `cluster.toml`, then defaults.

Secrets (token, cookies) have no flags, because every user of a machine can read command lines.
"""

import os
import typing as tp
from pathlib import Path

import pydantic

from saev.config.base import Config
from saev.config.run import read_toml
from saev.errors import ConfigError, did_you_mean

CLUSTER_FILE = "cluster.toml"

ENVIRONMENT = {
    "endpoint": "KFP_ENDPOINT",
    "ui": "KFP_UI",
    "token": "KFP_TOKEN",
    "token_file": "KFP_TOKEN_FILE",
    "cookies": "KFP_COOKIES",
    "user": "KFP_USER",
    "ca_file": "KFP_CA_FILE",
    "namespace": "KFP_NAMESPACE",
    "kfp_namespace": "KFP_SYSTEM_NAMESPACE",
    "kubeconfig": "KUBECONFIG",
    "context": "KUBE_CONTEXT",
    "timeout": "KFP_TIMEOUT",
    "experiment": "KFP_EXPERIMENT",
    "explorer": "SAEV_EXPLORER",
    "root": "SAEV_ROOT",
    "image": "SAEV_IMAGE",
    "cpu_image": "SAEV_CPU_IMAGE",
    "storage": "SAEV_STORAGE",
}


class Settings(Config):
    """Everything that a user sets once per cluster."""

    endpoint: str = ""
    """URL of Kubeflow Pipelines, such as https://kubeflow.example.com/pipeline. "" forwards a port
    with the kubeconfig, or uses the service inside the cluster."""
    ui: str = ""
    """URL at which a browser opens the UI; by default the endpoint."""
    token: str = ""
    """Bearer token."""
    token_file: str = ""
    """File with the bearer token, read for every request."""
    cookies: str = ""
    """Cookie header of a browser session, such as oauth2_proxy_kubeflow=…."""
    user: str = ""
    """Value of the header kubeflow-userid, for a multi-user API behind a forwarded port."""
    ca_file: str = ""
    """File with the certificates (PEM) of the authority that signed the endpoint's certificate."""
    namespace: str = ""
    """Namespace of the runs: the profile's if Kubeflow is multi-user, else that of KFP."""
    kfp_namespace: str = "kubeflow"
    """Namespace in which KFP itself runs."""
    kubeconfig: str = ""
    """Path of the kubeconfig; by default ~/.kube/config."""
    context: str = ""
    """Context of the kubeconfig; by default its current one."""
    timeout: float = pydantic.Field(default=30.0, gt=0.0)
    """Seconds that a server may take to answer."""
    experiment: str = "saev"
    """Experiment in which runs are started."""
    service_account: str = "saev-steps"
    """Service account of the steps' pods."""
    schedule_account: str = "saev-schedule"
    """Service account of the firings of schedules, which start runs."""
    explorer: str = ""
    """URL at which the explorer is shown, such as https://kubeflow.example.com/saev-explorer; ""
    forwards a port to it."""
    root: str = ""
    """URL of the storage root, as the pods see it."""
    image: str = ""
    """The runtime image, by an immutable tag or a digest."""
    cpu_image: str = ""
    """The small image for steps without torch; by default the runtime image."""
    storage: tp.Literal["object", "pvc"] = "object"
    """object, or pvc where a volume is mounted at /data."""
    parameters: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Parameters of runs, such as gpu_count or n_parts."""
    compile: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Constants of the compiled pipeline, such as parallelism or timeout_hours."""

    @pydantic.field_validator("endpoint", "ui", "explorer")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"expected a URL that begins with https:// or http://, not {value!r}")
        # From a pasted address of a page of the UI, or of the API, the part before it is taken.
        return value.split("/#", 1)[0].split("/apis/", 1)[0].rstrip("/")

    def bearer_token(self) -> str:
        """The token to send now; "" if there is none. Raises ConfigError."""
        if self.token:
            return self.token
        if not self.token_file:
            return ""
        try:
            return Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(
                f"Cannot read the token file {self.token_file}: {err}. Check KFP_TOKEN_FILE."
            ) from err


def load(
    flags: dict[str, tp.Any], cluster_file: str = "", environ: tp.Mapping[str, str] | None = None
) -> Settings:
    """Merge the four sources.

    Args:
        flags: the values of the command line; empty values count as not given.
        cluster_file: path of the file; "" means `cluster.toml`, which may be missing.
        environ: the environment; by default that of the process.

    Raises:
        ConfigError: a source has an unknown key or a wrong value; the message names the source.
        StorageError: the file was named and cannot be read.
    """
    environ = os.environ if environ is None else environ
    path = cluster_file or CLUSTER_FILE
    from_file = read_toml(path) if cluster_file or Path(path).exists() else {}
    from_environ = {key: environ[name] for key, name in ENVIRONMENT.items() if environ.get(name)}
    layers = (
        (from_file, path),
        (from_environ, f"environment ({', '.join(ENVIRONMENT[key] for key in from_environ)})"),
        ({key: value for key, value in flags.items() if value not in ("", None)}, "flags"),
    )
    merged: dict[str, tp.Any] = {}
    for values, source in layers:
        _known(values, source)
        checked = Settings.from_dict(values, source=source)
        merged |= {key: getattr(checked, key) for key in values}
    return Settings.from_dict(merged, source="settings")


def _known(values: dict[str, tp.Any], source: str) -> None:
    for key in values:
        if key not in Settings.model_fields:
            raise ConfigError(
                f"Unknown key {key!r} in {source}.{did_you_mean(key, Settings.model_fields)} "
                "cluster.example.toml lists all."
            )
