"""Checks and compiles a job on the user's machine, before the first request."""

import typing as tp

from pipelines import arguments, parameters
from pipelines.definition import Compiled, compile_pipeline
from pipelines.options import CompileOptions, PipelineName, PodOptions
from pipelines.settings import Settings
from saev import storage
from saev.config.run import RunFile
from saev.config.stages import images_of, resolve_stages
from saev.errors import ConfigError

_FILE = "cluster.toml [parameters]"
_FLAG = "--param"
_OF_FIRINGS = frozenset({"root", "dataset", "config", "claim", "claim_hours"})
"""Parameters that a firing itself gives to the runs that it starts."""


class Job(tp.NamedTuple):
    """A pipeline and the parameters of its runs, all of it checked."""

    compiled: Compiled
    parameters: dict[str, tp.Any]
    pods: PodOptions
    """How its pods are made. The compiled pipeline contains it."""
    started: "Job | None" = None
    """The job that each firing of a schedule starts, without the parameters that firings give."""


def compiled(name: PipelineName, settings: Settings, pods: PodOptions) -> Compiled:
    """The pipeline for a cluster.

    Args:
        name: which pipeline.
        settings: the cluster.
        pods: how its pods are made.

    Raises:
        ConfigError: a value is wrong or missing.
    """
    if not settings.image:
        raise ConfigError(
            "No image is set. Build and push one with `make image IMAGE=registry/saev PUSH=1`, and "
            "set SAEV_IMAGE (image in cluster.toml) to it."
        )
    if "pods" in settings.compile:
        raise ConfigError("cluster.toml: pods is no key of [compile]. Use [parameters].")
    fields = {"storage": settings.storage, **settings.compile}
    fields |= {"image": settings.image, "cpu_image": settings.cpu_image or settings.image}
    options = CompileOptions.from_dict(fields, source="cluster.toml [compile]")
    if pods.queue and options.launch != "job" and pods.train_nodes == "1":
        raise ConfigError(
            f"Parameter queue is {pods.queue!r}, but the pods of a loop wait in no queue. Set "
            'launch = "job" in cluster.toml, under [compile], or train_nodes, or leave queue out.'
        )
    return compile_pipeline(name, options.model_copy(update={"pods": pods}))


def pods(settings: Settings, pairs: tp.Mapping[str, tp.Any] | None = None) -> PodOptions:
    """How pods are made, by cluster.toml and the parameters of the command line.

    Raises:
        ConfigError: a value is wrong.
    """
    return PodOptions.of(
        {
            **parameters.check_pods(settings.parameters, _FILE),
            **parameters.check_pods(pairs or {}, _FLAG),
        }
    )


def job(
    name: PipelineName,
    settings: Settings,
    asked: arguments.Job,
    *,
    dataset: str,
    extra: dict[str, tp.Any] | None = None,
) -> Job:
    """Check everything that can be checked without a network, and compile.

    Args:
        name: which pipeline.
        settings: the cluster.
        asked: config and parameters, as the command line gives them.
        dataset: URL of the dataset, or of the prefix of saev-incoming.
        extra: parameters that have flags of their own.

    Raises:
        ConfigError: a value is wrong or missing; the message says which.
        StorageError: the config or its sweep cannot be read.
    """
    if not settings.root:
        raise ConfigError(
            "No storage root is set. Set SAEV_ROOT (root in cluster.toml) to a URL such as "
            "s3://bucket/saev, or to /data/saev on a volume."
        )
    dataset = place(dataset, "the dataset", settings)
    root = place(settings.root, "the root", settings)
    file = RunFile.portable(asked.config)
    source = storage.normalize(asked.config)
    # A prefix is no dataset, but all datasets below it are read in the same way.
    images = images_of(file, dataset)
    if images is None:
        raise ConfigError(
            f"No dataset: say DATASET=s3://… (--dataset), or add a [data] table to {source}."
        )
    if not dataset and hasattr(images, "root"):
        place(str(images.root), f"data.root of {source}", settings)
    resolve_stages(file, root, images, source)
    given = parameters.parse(asked.param)
    how = pods(settings, given)
    own = compiled(name, settings, how)
    started = compiled("saev", settings, how) if name == "saev-incoming" else None
    pipeline = combined(own, started) if started else own
    usual = usual_parameters(pipeline, settings)
    values: dict[str, tp.Any] = {"dataset": dataset, "root": root, "config": plain(file, source)}
    values = {
        **usual,
        **parameters.check(pipeline, given, _FLAG),
        **parameters.check(pipeline, {**values, **(extra or {})}, "flags"),
    }
    values = parameters.complete(pipeline, values, chosen=given)
    if started is None:
        return Job(own, values, how)
    of_firing, of_run = split_parameters(own, started, values)
    return Job(own, of_firing, how, Job(started, of_run, how))


def combined(firing: Compiled, started: Compiled) -> Compiled:
    """A schedule's pipeline for its user: it also has the parameters of the runs that it starts."""
    parameters_of_both = {**started.parameters, **firing.parameters}
    return started._replace(name=firing.name, parameters=parameters_of_both)


def split_parameters(
    firing: Compiled, started: Compiled, values: dict[str, tp.Any]
) -> tuple[dict[str, tp.Any], dict[str, tp.Any]]:
    """Divide values for both into those of a firing and those of the runs that it starts."""
    own = {key: value for key, value in values.items() if key in firing.parameters}
    theirs = {key: value for key, value in values.items() if key in started.parameters}
    return own, {key: value for key, value in theirs.items() if key not in _OF_FIRINGS}


def usual_parameters(pipeline: Compiled, settings: Settings) -> dict[str, tp.Any]:
    """The parameters that `cluster.toml` sets for every run, checked. Raises ConfigError."""
    return parameters.check(pipeline, settings.parameters, _FILE)


def place(url: str, what: str, settings: Settings) -> str:
    """The normalised URL, if it is one that pods can use. Raises ConfigError."""
    if url and "://" not in url and not url.startswith("/"):
        raise ConfigError(
            f"{what} is {url!r}, which pods cannot find. Give a URL such as s3://bucket/x, or with "
            "a volume (storage = pvc) a path below /data."
        )
    if not url:
        return ""
    url = storage.normalize(url)
    is_path = "://" not in url
    if is_path and settings.storage == "object":
        raise ConfigError(
            f"{what} is the path {url}, but the pods mount no volume (storage = object). Give a "
            "URL such as s3://bucket/x, or set SAEV_STORAGE=pvc."
        )
    if is_path and url != "/data" and not url.startswith("/data/"):
        raise ConfigError(f"{what} is {url}, but pods see only what is below /data. Move it there.")
    return url


def plain(file: RunFile, source: str) -> dict[str, tp.Any]:
    """The config as JSON without null, which KFP cannot pass on. Raises ConfigError."""
    values = file.model_dump(mode="json", exclude_none=True)
    null = _null(values, "")
    if null:
        raise ConfigError(f"{source}: {null} is null, which KFP cannot pass on; leave it out.")
    return values


def _null(value: tp.Any, key: str) -> str:
    """The dotted key of the first null; "" if there is none."""
    if value is None:
        return key
    children: tp.Iterable[tuple[tp.Any, tp.Any]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    found = (_null(child, f"{key}.{name}" if key else str(name)) for name, child in children)
    return next((text for text in found if text), "")
