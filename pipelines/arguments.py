"""The commands of `python -m pipelines` and their flags. Imports are few, so --help is fast."""

import typing as tp

import pydantic
import tyro

from pipelines.options import PipelineName
from saev.config.base import Config
from saev.config.named import ConfigFile

Text: tp.TypeAlias = tp.Annotated[str, tyro.conf.arg(help_behavior_hint="")]
"""A flag whose help text explains its default."""
Number: tp.TypeAlias = tp.Annotated[
    float | None, tyro.conf.arg(help_behavior_hint="", metavar="NUMBER")
]


class Cluster(Config):
    """Which cluster. Environment variables or cluster.toml may set every flag instead."""

    endpoint: Text = ""
    """URL of Kubeflow Pipelines [KFP_ENDPOINT]; by default a port is forwarded with the kubeconfig,
    and a pod uses the service of its cluster."""
    namespace: Text = ""
    """Namespace of the runs [KFP_NAMESPACE]; that of your profile if Kubeflow is multi-user."""
    kfp_namespace: Text = ""
    """Namespace of KFP itself [KFP_SYSTEM_NAMESPACE]; kubeflow by default."""
    kubeconfig: Text = ""
    """Path of the kubeconfig [KUBECONFIG]; ~/.kube/config by default."""
    context: Text = ""
    """Context of the kubeconfig [KUBE_CONTEXT]; its current one by default."""
    ca_file: Text = ""
    """File with the certificates (PEM) of the endpoint's authority [KFP_CA_FILE]."""
    token_file: Text = ""
    """File with a bearer token [KFP_TOKEN_FILE; the token itself: KFP_TOKEN]."""
    timeout: Number = None
    """Seconds that a server may take to answer [KFP_TIMEOUT]; 30 by default."""
    cluster_file: Text = ""
    """Path of the file with these settings; by default cluster.toml, which may be missing."""


class Images(Config):
    """What the pods run."""

    image: Text = ""
    """The runtime image [SAEV_IMAGE], by an immutable tag or a digest."""
    cpu_image: Text = ""
    """The small image [SAEV_CPU_IMAGE]; the runtime image by default."""
    storage: tp.Annotated[
        tp.Literal["object", "pvc", ""],
        tyro.conf.arg(help_behavior_hint="", metavar="{object,pvc}"),
    ] = ""
    """object, or pvc where a volume is mounted at /data [SAEV_STORAGE]; object by default."""


class Job(Config):
    """What is computed."""

    config: ConfigFile = pydantic.Field(default="dinov2-small", validate_default=True)
    """As in `saev run --config`: the name of a config of saev, or a TOML file with the tables
    [shards], [train], … Its sweep is sent with it."""
    root: Text = ""
    """URL of the storage root [SAEV_ROOT], such as s3://bucket/saev."""
    param: tp.Annotated[
        list[str], tyro.conf.arg(help_behavior_hint="", metavar="KEY=VALUE ...")
    ] = pydantic.Field(default_factory=list)
    """Parameters of the run, such as n_parts=2 gpu_count=0 memory=64Gi. The error after a wrong
    name lists all."""


_Cluster: tp.TypeAlias = tyro.conf.OmitArgPrefixes[Cluster]
_Images: tp.TypeAlias = tyro.conf.OmitArgPrefixes[Images]
_Job: tp.TypeAlias = tyro.conf.OmitArgPrefixes[Job]


class Compile(Config):
    """Write a pipeline as YAML, to look at or to upload by hand."""

    pipeline: PipelineName = "saev"
    """saev for one dataset, saev-incoming for every new one below a prefix."""
    out: str = "pipeline.yaml"
    """Path of the file; - writes to standard output."""
    images: _Images = pydantic.Field(default_factory=Images)
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Submit(Config):
    """Start a run on a dataset. Its URL is the only thing on standard output."""

    dataset: Text = ""
    """URL of a folder of images, such as s3://bucket/images; by default the config's [data]."""
    name: Text = ""
    """Name of the run; by default the dataset's name and the time."""
    wait: bool = False
    """Show the steps until the run is over. If it fails, show its last log lines and exit with
    1."""
    max_retries: int = pydantic.Field(default=2, ge=0)
    """How often --wait retries a run that failed for a reason that may pass, such as an
    eviction."""
    check: bool = True
    """Check from here that dataset and root exist, if this machine has credentials."""
    job: _Job = pydantic.Field(default_factory=Job)
    images: _Images = pydantic.Field(default_factory=Images)
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Schedule(Config):
    """Process what is new below a prefix, again and again."""

    dataset: str
    """URL of the folder whose folders are the datasets, such as s3://bucket/incoming/."""
    cron: str
    """When, in UTC: 6 fields, the first of them seconds. '0 0 3 * * *' is 03:00 every day."""
    name: Text = ""
    """Name of the schedule; by default saev- and the prefix's name. A schedule with the same name
    is replaced."""
    wait: bool = False
    """Wait for the firings of a schedule that is replaced, and delete it. Without this, such a
    schedule is switched off and kept while it has firings."""
    marker: Text = ""
    """Name of the object that says that a dataset is complete, such as _SUCCESS; by default a
    dataset is complete when nothing in it has changed for --settle-minutes."""
    settle_minutes: Number = None
    """See --marker; 60 by default."""
    claim_hours: Number = None
    """How long a dataset stays claimed when its run gives no more sign of life; 24 by default."""
    check: bool = True
    """Check from here that prefix and root exist, if this machine has credentials."""
    job: _Job = pydantic.Field(default_factory=Job)
    images: _Images = pydantic.Field(default_factory=Images)
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Schedules(Config):
    """List the schedules, and when each fires next."""

    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Unschedule(Config):
    """Switch a schedule off. It is deleted if no firing of it is active, because KFP would end
    active firings with it."""

    name: tyro.conf.Positional[str]
    """Its name or id."""
    wait: bool = False
    """Wait until its firing is over, then delete it. Runs that firings started go on."""
    force: bool = False
    """Delete it although firings are active. KFP before 2.16 ends them, and their claims expire."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class List(Config):
    """List the newest runs."""

    n: int = pydantic.Field(default=20, ge=1, le=1000)
    """Number of runs."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Status(Config):
    """Show a run and its steps."""

    run: tyro.conf.Positional[Text] = ""
    """Id, unique prefix of one, name or URL of a run; the newest by default."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Watch(Config):
    """Show a run's steps until it is over, as `submit --wait` does."""

    run: tyro.conf.Positional[Text] = ""
    """Id, unique prefix of one, name or URL of a run; the newest by default."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Logs(Config):
    """Print the logs of a run's pods."""

    run: tyro.conf.Positional[Text] = ""
    """Id, unique prefix of one, name or URL of a run; the newest by default."""
    step: Text = ""
    """Print only the logs of one step, such as extract."""
    tail: int = pydantic.Field(default=200, ge=0)
    """Lines of each pod; 0 prints all."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Show(Config):
    """Show the page of a run, or of everything, in the browser. Ctrl-C ends it.

    The page is read from storage with this machine's credentials (AWS_…), and served on localhost.
    """

    run: tyro.conf.Positional[Text] = ""
    """URL of a page or of its folder (a root, a run of saev, a report); or a pipeline run, whose
    root is shown; by default SAEV_ROOT."""
    port: int = pydantic.Field(default=0, ge=0, le=65535)
    """Port on 127.0.0.1; 0 takes one that is free."""
    browser: bool = True
    """Open the browser. Without it (--no-browser), the address is printed only."""
    from_cluster: bool = False
    """Read storage with the settings and keys of the pods (their config map and secret) instead of
    this machine's. A store inside the cluster is reached over a forwarded port."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Explorer(Config):
    """Show the explorer that runs in the cluster in the browser. Ctrl-C ends it.

    A local port is forwarded to it with the kubeconfig, unless the settings name its URL
    [SAEV_EXPLORER].
    """

    port: int = pydantic.Field(default=0, ge=0, le=65535)
    """Port on 127.0.0.1; 0 takes one that is free."""
    browser: bool = True
    """Open the browser. Without it (--no-browser), the address is printed only."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Cancel(Config):
    """Stop a run. Its finished work is kept, and a new run continues from there."""

    run: tyro.conf.Positional[str]
    """Id, unique prefix of one, name or URL of a run."""
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class Doctor(Config):
    """Check that a cluster is ready, one line per check. Exits with 1 if something failed."""

    root: Text = ""
    """URL of the storage root [SAEV_ROOT]."""
    dataset: Text = ""
    """URL of a dataset that the pods must be able to read."""
    pod: bool = True
    """Start short-lived pods that try images and storage as a step does, and delete them."""
    images: _Images = pydantic.Field(default_factory=Images)
    cluster: _Cluster = pydantic.Field(default_factory=Cluster)


class RunLocal(Config):
    """Run the whole pipeline on this machine, every step in a Docker container."""

    runner: tp.Literal["docker", "process"] = "docker"
    """docker: as on a cluster. process: the same steps as processes, where there is no Docker."""
    dataset: Text = ""
    """Folder or URL of the images; by default the config's [data]."""
    config: ConfigFile = pydantic.Field(default="dinov2-small", validate_default=True)
    """As in `saev run --config`."""
    root: str = "./saev-out"
    """Folder or URL for all results."""
    image: str = "saev:dev"
    """The runtime image, from `make image`."""
    cpu_image: str = "saev-cpu:dev"
    """The small image."""
    pipeline: PipelineName = "saev"
    """saev: one dataset. saev-incoming: every new dataset in the folder."""
    n_parts: int = pydantic.Field(default=2, ge=1)
    """Most containers for the extraction, and for the inference of each SAE."""
    outputs: str = "./saev-local"
    """Folder for metrics and pages of each step, which Kubeflow's UI would show."""
    gpus: bool = False
    """Give every container all GPUs."""
    network: str = "bridge"
    """Docker network; `host` reaches servers on this machine."""
    user: Text = ""
    """UID:GID of the containers; by default yours, with group 0."""
    param: tp.Annotated[
        list[str], tyro.conf.arg(help_behavior_hint="", metavar="KEY=VALUE ...")
    ] = pydantic.Field(default_factory=list)
    """Further parameters of the pipeline, such as settle_minutes=0."""


COMMANDS: dict[str, type[Config]] = {
    "submit": Submit,
    "schedule": Schedule,
    "schedules": Schedules,
    "unschedule": Unschedule,
    "list": List,
    "status": Status,
    "show": Show,
    "explorer": Explorer,
    "watch": Watch,
    "logs": Logs,
    "cancel": Cancel,
    "doctor": Doctor,
    "compile": Compile,
    "run-local": RunLocal,
}
