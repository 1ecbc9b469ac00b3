"""Recurring runs: a schedule has a name, and there is one of each name."""

import datetime
import logging
import typing as tp

import kfp_server_api
import rich.console
import rich.table

from pipelines import cron, prepare, runs, steps, submit
from pipelines.connect import Kfp
from pipelines.errors import ClusterError
from pipelines.settings import did_you_mean
from saev import storage
from saev.errors import ConfigError

logger = logging.getLogger(__name__)

_PAGE = 100


def default_name(dataset: str) -> str:
    """Name of the schedule of a prefix."""
    return f"saev-{storage.name(dataset)}"


def create(kfp: Kfp, job: prepare.Job, name: str, when: cron.Cron) -> tp.Any:
    """Make a schedule, in place of those that have its name.

    KFP cannot change one, so the new one is made before the old ones are deleted: firings are never
    lost, and two at once are harmless, since they claim datasets before they process them.

    Raises:
        ClusterError: KFP refuses; the message says what there is now.
    """
    old = [item for item in existing(kfp) if item.display_name == name]
    version = submit.upload(kfp, job.compiled)
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        description=submit.describe(job),
        experiment_id=submit.experiment(kfp),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=job.parameters),
        service_account=kfp.settings.service_account,
        trigger=kfp_server_api.V2beta1Trigger(
            cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=when.text)
        ),
        mode="ENABLE",
        max_concurrency="1",
        no_catchup=True,
    )
    with kfp.explained(f"make schedule {name}"):
        made = kfp.recurring.recurring_run_service_create_recurring_run(body)
    for item in old:
        logger.info("replacing schedule %s (%s)", name, item.recurring_run_id)
        try:
            _delete(kfp, item)
        except ClusterError as err:
            raise ClusterError(
                f"The new schedule {name} is made, but the old one ({item.recurring_run_id}) is "
                f"still there: {err} The same command again replaces both."
            ) from err
    return made


def existing(kfp: Kfp) -> list[tp.Any]:
    """All schedules of the namespace, newest first."""
    found: list[tp.Any] = []
    token = ""
    while True:
        with kfp.explained("list schedules"):
            answer = kfp.recurring.recurring_run_service_list_recurring_runs(
                page_size=_PAGE, page_token=token, sort_by="created_at desc", **kfp.in_namespace
            )
        found += answer.recurring_runs or []
        token = answer.next_page_token or ""
        if not token:
            return found


def delete(kfp: Kfp, name: str) -> list[str]:
    """Delete the schedules of a name, or of an id. Returns their ids.

    Raises:
        ClusterError: there is none.
    """
    items = existing(kfp)
    chosen = [item for item in items if name in (item.display_name, item.recurring_run_id)]
    if not chosen:
        hint = did_you_mean(name, [item.display_name for item in items])
        raise ClusterError(f"There is no schedule {name!r}.{hint} `make schedules` lists them.")
    for item in chosen:
        _delete(kfp, item)
    return [item.recurring_run_id for item in chosen]


def _delete(kfp: Kfp, item: tp.Any) -> None:
    try:
        with kfp.explained(f"delete schedule {item.display_name}"):
            kfp.recurring.recurring_run_service_delete_recurring_run(item.recurring_run_id)
    except ClusterError as err:
        if err.status != 404:  # somebody else deleted it
            raise


def show(items: list[tp.Any], console: rich.console.Console) -> None:
    """A table of schedules."""
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
    """When a schedule fires next, empty if that is not known from its expression."""
    try:
        when = cron.parse(text_of(item)).next(datetime.datetime.now(datetime.UTC))
    except ConfigError:  # made by others, in another form
        return ""
    return f"{when[0]:%Y-%m-%d %H:%M}" if when else ""
