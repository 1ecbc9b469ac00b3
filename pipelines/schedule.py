"""Makes, lists and deletes schedules (KFP's recurring runs). Each schedule has its own name.

A recurring run owns the Workflows of its firings, but not the runs on datasets, which the firings
start. When a recurring run is deleted, the Workflows of its firings and their pods are deleted as
well, and KFP shows these firings as running for ever. So a schedule is first switched off, and
deleted when no firing is active. (In version 0.1.0, a firing processed the datasets itself. Such
schedules may still exist.)
"""

import datetime
import functools
import logging
import time
import typing as tp

import kfp_server_api
import rich.console
import rich.table

from pipelines import called, connect, cron, prepare, runs, steps, submit, watch
from pipelines.connect import Kfp
from pipelines.errors import ClusterError
from pipelines.kube import Kube
from saev import storage
from saev.config.steps import Start
from saev.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

_PAGE = 100


def default_name(dataset: str) -> str:
    """The default name of a schedule for a prefix."""
    return f"saev-{storage.name(dataset)}"


def create(kfp: Kfp, job: prepare.Job, name: str, when: cron.Cron, *, wait: bool = False) -> tp.Any:
    """Make a schedule. It replaces existing schedules of the same name.

    KFP cannot change a schedule. So the new one is made before the old ones are switched off, and
    no firing is lost. Two firings at the same time do no harm, because they claim datasets before
    they start runs. An old schedule with active firings is switched off and kept, unless ``wait``
    is set.

    Args:
        kfp: the connection.
        job: what the schedule starts.
        name: its name.
        when: when it fires.
        wait: wait for the firings of old schedules, and then delete these schedules.

    Raises:
        ClusterError: KFP refuses. The message says which schedules exist now.
    """
    old = [item for item in existing(kfp) if item.display_name == name]
    _check_account(kfp)
    version = submit.upload(kfp, job.compiled)
    experiment = submit.experiment(kfp)
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        description=submit.describe(job),
        experiment_id=experiment,
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(
            parameters={**job.parameters, "start": _start(kfp, job, experiment)}
        ),
        service_account=kfp.settings.schedule_account,
        trigger=kfp_server_api.V2beta1Trigger(
            cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=when.text)
        ),
        mode="ENABLE",
        max_concurrency="1",
        no_catchup=True,
    )
    with kfp.explained(f"make schedule {name}"):
        made = kfp.recurring.recurring_run_service_create_recurring_run(body)
    if old:
        ids = ", ".join(item.recurring_run_id for item in old)
        logger.info("replacing schedule %s (%s)", name, ids)
    try:
        busy = _retire(kfp, old, wait=wait)
    except ClusterError as err:
        raise ClusterError(
            f"The new schedule {name} is made, but an old one still exists: {err} The same "
            "command again replaces both."
        ) from err
    if busy:
        logger.warning(
            "The old schedule %s is switched off and fires no more. It is kept until its firings "
            "are over, because KFP would end them with it: %s. Then `%s` or `%s` with this name "
            "deletes it.",
            name,
            _names(busy),
            called.by("schedule"),
            called.by("unschedule"),
        )
    return made


def _check_account(kfp: Kfp) -> None:
    """Raise ClusterError if the firings' service account certainly does not exist.

    Without a kubeconfig, or without permission to look, nothing is checked.
    """
    name = kfp.settings.schedule_account
    try:
        kube = Kube(kfp.settings)
        with kube.explained(f"look at service account {name}"):
            kube.core.read_namespaced_service_account(name, kfp.pods)
    except ClusterError as err:
        if err.status == 404:
            raise ClusterError(
                f"There is no service account {name} in namespace {kfp.pods}, which the firings of "
                f"schedules run as. `make install OVERLAY=… NAMESPACE={kfp.pods}` makes it."
            ) from err
    except ConfigError:
        return


def _start(kfp: Kfp, job: prepare.Job, experiment: str) -> dict[str, tp.Any]:
    """The parameter `start` of the firings: what they start, and where."""
    assert job.started is not None
    version = submit.upload(kfp, job.started.compiled)
    start = Start(
        endpoint=connect.in_cluster(kfp.settings),
        experiment_id=experiment,
        pipeline_id=version.pipeline_id,
        version_id=version.version_id,
        service_account=kfp.settings.service_account,
        arguments=job.started.parameters,
    )
    return start.model_dump()


def existing(kfp: Kfp) -> list[tp.Any]:
    """All schedules of the namespace, newest first."""
    pages = kfp.pages(
        "list schedules",
        lambda token: kfp.recurring.recurring_run_service_list_recurring_runs(
            page_size=_PAGE, page_token=token, sort_by="created_at desc", **kfp.in_namespace
        ),
    )
    return [item for page in pages for item in page.recurring_runs or []]


def delete(kfp: Kfp, name: str, *, wait: bool = False, force: bool = False) -> list[str]:
    """Switch off and delete the schedules with a name or an id. Returns their ids.

    Args:
        kfp: the connection.
        name: the name or the id.
        wait: first wait until their firings are over.
        force: delete them although firings are active.

    Raises:
        ClusterError: there is no such schedule, or it has active firings. In the second case it is
            switched off.
    """
    items = existing(kfp)
    chosen = [item for item in items if name in (item.display_name, item.recurring_run_id)]
    if not chosen:
        hint = did_you_mean(name, [item.display_name for item in items])
        raise ClusterError(
            f"There is no schedule {name!r}.{hint} `{called.by('schedules')}` lists them."
        )
    busy = _retire(kfp, chosen, wait=wait, force=force)
    if busy:
        raise ClusterError(
            f"Schedule {name} is switched off and fires no more, but is not deleted yet: KFP would "
            f"end its firings with it, and these are active: {_names(busy)}. "
            f"`{called.by('unschedule', name)} {called.WAIT}` waits for them and deletes it; "
            f"`{called.by('cancel', busy[0].run_id)}` stops one."
        )
    return [item.recurring_run_id for item in chosen]


def _retire(kfp: Kfp, items: list[tp.Any], *, wait: bool, force: bool = False) -> list[tp.Any]:
    """Switch schedules off, and delete those without active firings.

    Returns:
        The active firings of the other schedules.
    """
    for item in items:
        _switch_off(kfp, item)
    told = ""
    while True:
        runs_of: dict[str, list[tp.Any]] = {}
        for item in items:
            request = functools.partial(_active, kfp, item)
            if force:
                active = []
            else:
                active = watch.with_retries(request, logger.warning) if wait else request()
            if active:
                runs_of[item.recurring_run_id] = active
            else:
                _delete(kfp, item)
        items = [item for item in items if item.recurring_run_id in runs_of]
        busy = [run for active in runs_of.values() for run in active]
        if not busy or not wait:
            return busy
        if _names(busy) != told:
            told = _names(busy)
            logger.info("switched off; waiting until these runs are over: %s", told)
        time.sleep(watch.POLL_SECONDS)


def _active(kfp: Kfp, item: tp.Any) -> list[tp.Any]:
    """The firings of a schedule that are not over, newest first."""
    with kfp.explained(f"look for runs of schedule {item.display_name}"):
        return runs.unfinished(kfp, recurring_run_id=item.recurring_run_id)


def _names(active: list[tp.Any]) -> str:
    return ", ".join(f"{run.display_name} ({run.run_id})" for run in active)


def _switch_off(kfp: Kfp, item: tp.Any) -> None:
    if item.status == "DISABLED":
        return
    try:
        with kfp.explained(f"switch off schedule {item.display_name}"):
            kfp.recurring.recurring_run_service_disable_recurring_run(item.recurring_run_id)
    except ClusterError as err:
        if err.status != 404:  # somebody else deleted it
            raise


def _delete(kfp: Kfp, item: tp.Any) -> None:
    """Delete a schedule. KFP 2.16 and newer keeps a firing that started at the last moment."""
    try:
        with kfp.explained(f"delete schedule {item.display_name}"):
            kfp.recurring.recurring_run_service_delete_recurring_run(
                item.recurring_run_id, propagation_policy="ORPHAN"
            )
    except ClusterError as err:
        if err.status != 404:  # somebody else deleted it
            raise


def show(items: list[tp.Any], console: rich.console.Console) -> None:
    """Print a table of schedules."""
    rows = rich.table.Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("NAME", "CRON (UTC)", "NEXT", "STATE", "PREFIX", "ID"):
        rows.add_column(title, overflow="fold")
    for item in items:
        is_on = item.status == "ENABLED"
        rows.add_row(
            item.display_name,
            text_of(item),
            next_firing(item) if is_on else "",
            "on" if is_on else "off",
            runs.parameter(item, "dataset"),
            item.recurring_run_id,
        )
    console.print(rows)


def text_of(item: tp.Any) -> str:
    """The cron expression of a schedule, or its interval."""
    trigger = item.trigger
    if trigger and trigger.cron_schedule:
        return trigger.cron_schedule.cron or ""
    interval = trigger and trigger.periodic_schedule and trigger.periodic_schedule.interval_second
    return f"every {steps.seconds(int(interval))}" if interval else ""


def next_firing(item: tp.Any) -> str:
    """When a schedule fires next; "" if its expression cannot be read."""
    try:
        when = cron.parse(text_of(item)).next(datetime.datetime.now(datetime.UTC))
    except ConfigError:  # somebody made it with another tool, in another form
        return ""
    return f"{when[0]:%Y-%m-%d %H:%M}" if when else ""
