"""Uploads a pipeline and starts a run of it."""

import datetime
import logging
import tempfile
import threading
import typing as tp
from pathlib import Path

import kfp_server_api

import saev
from pipelines import called, prepare, runs
from pipelines.connect import Kfp
from pipelines.definition import Compiled
from pipelines.errors import ClusterError
from pipelines.runs import named
from saev import storage
from saev.errors import StorageError

logger = logging.getLogger(__name__)

_STORAGE_SECONDS = 20.0
_LONGEST_NAME = 60
"""Most characters of the dataset's name. The time follows it, and the UI cuts long names."""


class Version(tp.NamedTuple):
    """An uploaded pipeline."""

    pipeline_id: str
    version_id: str


def start(kfp: Kfp, job: prepare.Job, name: str) -> tp.Any:
    """Start a run.

    Args:
        kfp: the connection.
        job: the job to run.
        name: the run's name; "" makes a name from the dataset's name and the time.

    Raises:
        ClusterError: KFP refuses.
    """
    version = upload(kfp, job.compiled)
    body = kfp_server_api.V2beta1Run(
        display_name=name or default_name(job.parameters),
        description=describe(job),
        experiment_id=experiment(kfp),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=job.parameters),
        service_account=kfp.settings.service_account,
    )
    try:
        with kfp.explained("start the run"):
            return kfp.runs.run_service_create_run(run=body)
    except ClusterError as err:
        if err.status:
            raise
        raise ClusterError(
            f"{err} The run may have started: `{called.by('list')}` shows it."
        ) from err


def warn_of_others(kfp: Kfp, job: prepare.Job) -> None:
    """Warn about runs that process the same dataset with the same config now.

    The new run takes over their claim, because a person asked for it.
    """
    try:
        with kfp.explained("look for other runs of this dataset"):
            found = runs.unfinished(kfp)
    except ClusterError as err:
        logger.warning("not checked whether another run processes the dataset: %s", err)
        return
    for run in found:
        certainty = _does_the_same(run, job)
        if certainty:
            logger.warning(
                "Run %s (%s) %s this dataset with this config. The new run takes it over: the "
                "other run stops at its next safe point and fails, and its supervisor does not "
                "retry. Its finished work is used. `%s` stops it at once.",
                run.display_name,
                run.run_id,
                certainty,
                called.by("cancel", run.run_id),
            )


def _does_the_same(run: tp.Any, job: prepare.Job) -> str:
    """`is processing`; `may be processing` for a firing of version 0.1.0; or ""."""
    theirs = (run.runtime_config and run.runtime_config.parameters) or {}
    ours = job.parameters
    if "start" in theirs or any(theirs.get(key) != ours[key] for key in ("root", "config")):
        return ""
    place, dataset = str(theirs.get("dataset") or ""), ours["dataset"]
    if place == dataset:
        return "is processing"
    return "may be processing" if place and dataset.startswith(f"{place}/") else ""


def default_name(parameters: tp.Mapping[str, tp.Any]) -> str:
    """The dataset's name and the time, in UTC."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{dataset_name(parameters)}-{now:%Y%m%d-%H%M%S}"


def dataset_name(parameters: tp.Mapping[str, tp.Any]) -> str:
    """A name for the images of a run: the last part of their place, shortened.

    Args:
        parameters: those of the run. If they name no dataset, the config's table [data] does.
    """
    data = parameters["config"].get("data") or {}
    place = parameters["dataset"] or data.get("root") or data.get("name") or data.get("kind")
    parts = [part for part in str(place or "saev").split("/") if part and "*" not in part]
    return parts[-1][:_LONGEST_NAME] if parts else "saev"


def describe(job: prepare.Job) -> str:
    """The description of a run in the UI."""
    return f"saev {saev.__version__}: {job.parameters['dataset'] or 'images of the config'}"


def experiment(kfp: Kfp) -> str:
    """Id of the experiment. It is made if it is missing."""
    name = kfp.settings.experiment

    def find() -> str:
        with kfp.explained(f"look for experiment {name}"):
            answer = kfp.experiments.experiment_service_list_experiments(
                filter=named(name), page_size=1, **kfp.in_namespace
            )
        return answer.experiments[0].experiment_id if answer.experiments else ""

    found = find()
    if found:
        return found
    body = kfp_server_api.V2beta1Experiment(display_name=name, **kfp.in_namespace)
    try:
        with kfp.explained(f"make experiment {name}"):
            return kfp.experiments.experiment_service_create_experiment(body).experiment_id
    except ClusterError as err:
        return _made_by_another(err, find)


def upload(kfp: Kfp, compiled: Compiled) -> Version:
    """Upload a pipeline and its version if they are missing. Returns their ids.

    Equal pipelines are one version, also if two users upload them at the same time.
    """
    pipeline_id = _pipeline(kfp, compiled.name)

    def find() -> str:
        with kfp.explained(f"look for version {compiled.digest} of pipeline {compiled.name}"):
            answer = kfp.pipelines.pipeline_service_list_pipeline_versions(
                pipeline_id, filter=named(compiled.digest), page_size=1
            )
        found = answer.pipeline_versions
        return found[0].pipeline_version_id if found else ""

    version_id = find()
    if version_id:
        return Version(pipeline_id, version_id)
    logger.info("uploading version %s of pipeline %s", compiled.digest, compiled.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")  # the server needs the ending .yaml
        path.write_text(compiled.text, encoding="utf-8")
        try:
            with kfp.explained(f"upload version {compiled.digest} of pipeline {compiled.name}"):
                made = kfp.uploads.upload_pipeline_version(
                    str(path),
                    name=compiled.digest,
                    pipelineid=pipeline_id,
                    description=f"saev {saev.__version__}, {kfp.settings.image}",
                )
            version_id = made.pipeline_version_id
        except ClusterError as err:
            version_id = _made_by_another(err, find)
    return Version(pipeline_id, version_id)


def _pipeline(kfp: Kfp, name: str) -> str:
    def find() -> str:
        with kfp.explained(f"look for pipeline {name}"):
            answer = kfp.pipelines.pipeline_service_list_pipelines(
                filter=named(name), page_size=1, **kfp.in_namespace
            )
        return answer.pipelines[0].pipeline_id if answer.pipelines else ""

    found = find()
    if found:
        return found
    body = kfp_server_api.V2beta1Pipeline(display_name=name, name=name, **kfp.in_namespace)
    try:
        with kfp.explained(f"make pipeline {name}"):
            return kfp.pipelines.pipeline_service_create_pipeline(body).pipeline_id
    except ClusterError as err:
        return _made_by_another(err, find)


def _made_by_another(err: ClusterError, find: tp.Callable[[], str]) -> str:
    """The id of an object that somebody else has just made. Raises `err` if there is none."""
    if err.status == 409:
        found = find()
        if found:
            return found
    raise err


def check_storage(dataset: str, root: str, *, is_prefix: bool = False) -> None:
    """Check dataset and root with this machine's credentials, if it has some.

    A dataset that certainly does not exist or is empty is an error. If only this machine may lack
    access, a warning is logged, because the pods have their own credentials.

    Args:
        dataset: URL of the dataset; "" if the config names it.
        root: URL of the storage root.
        is_prefix: whether ``dataset`` is the prefix of a schedule, which may still be empty.

    Raises:
        StorageError: the dataset does not exist or is empty.
    """
    look = _look_below if is_prefix else _check_readable
    for url, check in ((dataset, look), (root, storage.check_writable)):
        if not url:
            continue
        if "://" not in url:
            logger.info("not checked: %s, which is on the pods' volume", url)
            continue
        failed = _within(_STORAGE_SECONDS, check, url)
        if failed is None:
            logger.info("ok: %s is %s", url, "readable" if url == dataset else "writable")
        elif isinstance(failed, StorageError) and _is_missing(failed):
            raise failed
        else:
            why = failed or f"no answer within {_STORAGE_SECONDS:.0f} s"
            logger.warning("not checked from here: %s (%s)", url, why)


def _check_readable(url: str) -> None:
    if not storage.list_dir(url):
        raise StorageError(f"Dataset {url} is empty or does not exist. Check the URL.") from (
            FileNotFoundError(url)
        )


def _look_below(url: str) -> None:
    if not storage.list_dir(url, missing_ok=True):
        logger.info("note: nothing is below %s yet; the firings until then have nothing to do", url)


def _is_missing(err: StorageError) -> bool:
    return isinstance(err.__cause__, FileNotFoundError)


def _within(seconds: float, check: tp.Callable[[str], None], url: str) -> Exception | str | None:
    """Run a check. Returns its exception, "" if it takes too long, or None if it passed."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            check(url)
            outcome.append(None)
        except Exception as err:  # a store's client may raise anything when it has no credentials
            outcome.append(err)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else ""
