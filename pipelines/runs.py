"""Lists, finds, shows and cancels existing runs."""

import collections.abc
import itertools
import json
import re
import typing as tp

import rich.console
import rich.table

from pipelines import called, launched, logs, steps, watch
from pipelines.connect import Kfp
from pipelines.errors import ClusterError

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PAGE, _PAGES = 100, 5


def named(name: str) -> str:
    """The API's filter for objects with a name."""
    return json.dumps({"predicates": [_predicate("EQUALS", "display_name", name)]})


def _predicate(operation: str, key: str, value: str) -> dict[str, str]:
    return {"operation": operation, "key": key, "string_value": value}


def unfinished(kfp: Kfp, **equal: str) -> list[tp.Any]:
    """Up to a hundred runs that are not over, newest first.

    Args:
        kfp: the connection.
        equal: fields of the runs, and the value that each must have.
    """
    predicates = [_predicate("EQUALS", key, value) for key, value in equal.items()]
    predicates += [_predicate("NOT_EQUALS", "state", state) for state in sorted(steps.OVER)]
    answer = kfp.runs.run_service_list_runs(
        page_size=_PAGE,
        sort_by="created_at desc",
        filter=json.dumps({"predicates": predicates}),
        **kfp.in_namespace,
    )
    return answer.runs or []


def recent(kfp: Kfp, n: int) -> list[tp.Any]:
    """The newest runs, newest first."""
    return list(itertools.islice(_newest(kfp, min(n, _PAGE), "list runs"), n))


def _newest(kfp: Kfp, page_size: int, doing: str) -> collections.abc.Iterator[tp.Any]:
    """All runs, newest first. Pages are requested when they are needed."""
    pages = kfp.pages(
        doing,
        lambda token: kfp.runs.run_service_list_runs(
            page_size=page_size, page_token=token, sort_by="created_at desc", **kfp.in_namespace
        ),
    )
    for page in pages:
        yield from page.runs or []


def find(kfp: Kfp, which: str) -> tp.Any:
    """Find a run by its id, its URL, its name, or a unique prefix of id or name.

    Args:
        kfp: the connection.
        which: the id, URL, name or prefix; "" takes the newest run.

    Raises:
        ClusterError: no run matches, or several do.
    """
    if not which:
        newest = recent(kfp, 1)
        if not newest:
            raise ClusterError(f"There are no runs yet. `{called.by('submit', '…')}` starts one.")
        return get(kfp, newest[0].run_id)
    which = which.rsplit("/runs/details/", 1)[-1]  # of a URL, the id
    if _UUID.fullmatch(which):
        return get(kfp, which)
    with kfp.explained("look for the run"):
        found = (
            kfp.runs.run_service_list_runs(
                page_size=2, sort_by="created_at desc", filter=named(which), **kfp.in_namespace
            ).runs
            or []
        )
    if not found:
        runs = recent(kfp, _PAGE * _PAGES)
        found = [r for r in runs if r.run_id.startswith(which) or r.display_name.startswith(which)]
    if not found:
        raise ClusterError(
            f"There is no run {which!r}, neither by id nor by name. `{called.by('list')}` shows "
            "them."
        )
    if len(found) > 1:
        ids = ", ".join(run.run_id for run in found)
        raise ClusterError(f"Several runs are called {which!r}; choose one by its id: {ids}.")
    return get(kfp, found[0].run_id)


def started_by(kfp: Kfp, firing: tp.Any) -> list[tp.Any]:
    """The runs that a firing of a schedule started, newest first."""
    newest = itertools.takewhile(
        lambda run: run.created_at >= firing.created_at,
        _newest(kfp, _PAGE, "list the runs that it started"),
    )
    return [run for run in newest if _claim(run).get("run") == firing.run_id]


def _claim(run: tp.Any) -> dict[str, tp.Any]:
    """The claim that a firing gave to a run that it started; {} for other runs."""
    values = (run.runtime_config and run.runtime_config.parameters) or {}
    claim = values.get("claim")
    return claim if isinstance(claim, dict) else {}


def get(kfp: Kfp, run_id: str) -> tp.Any:
    """A run with its tasks."""
    with kfp.explained(f"look at run {run_id}"):
        return kfp.runs.run_service_get_run(run_id=run_id)


def cancel(kfp: Kfp, run: tp.Any) -> bool:
    """Ask KFP to stop a run. Returns False if it is over already."""
    if run.state in steps.OVER:
        return False
    with kfp.explained(f"cancel run {run.run_id}"):
        kfp.runs.run_service_terminate_run(run_id=run.run_id)
    return True


def parameter(run: tp.Any, name: str) -> str:
    """A parameter of a run or a schedule, as text."""
    values = (run.runtime_config and run.runtime_config.parameters) or {}
    return str(values.get(name, ""))


def show_list(kfp: Kfp, runs: list[tp.Any], console: rich.console.Console) -> None:
    """Print a table of runs."""
    rows = rich.table.Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("STATE", "NAME", "DATASET", "AGE", "TOOK", "ID"):
        rows.add_column(title, overflow="fold" if title in ("NAME", "DATASET") else "ellipsis")
    for run in runs:
        made, ended = steps.real_time(run.created_at), steps.real_time(run.finished_at)
        rows.add_row(
            steps.state_of(run),
            run.display_name,
            parameter(run, "dataset"),
            steps.duration(made, None),
            steps.duration(made, ended) if ended else "",
            run.run_id,
        )
    console.print(rows)
    console.print(f"{kfp.ui}/#/runs", style="dim", highlight=False)


def show_started(kfp: Kfp, firing: tp.Any, console: rich.console.Console) -> None:
    """Print the runs that a firing started."""
    found = started_by(kfp, firing)
    if not found:
        over = firing.state in steps.OVER
        console.print("It started no runs." if over else "It has started no runs yet.")
    for run in found:
        made, ended = steps.real_time(run.created_at), steps.real_time(run.finished_at)
        console.print(
            f"started  {run.display_name} ({run.run_id}): {steps.state_of(run)}, "
            f"{steps.duration(made, ended)}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def show_status(kfp: Kfp, run: tp.Any, console: rich.console.Console) -> None:
    """Print a run and its steps."""
    made, ended = steps.real_time(run.created_at), steps.real_time(run.finished_at)
    console.print(
        f"{run.display_name}: {steps.state_of(run)}, {steps.duration(made, ended)}", highlight=False
    )
    facts = {name: parameter(run, name) for name in ("dataset", "root")}
    facts["url"] = kfp.run_url(run.run_id)
    for name, value in facts.items():
        if value:
            console.print(f"{name:8}{value}", highlight=False, soft_wrap=True)
    console.print(watch.table(run, launched.JobReader(kfp).slots(run)))
    if steps.is_firing(run):
        show_started(kfp, run, console)
    if steps.state_of(run) == "failed":
        said = [f"KFP says: {text}" for text in steps.messages(run)]
        if steps.failing(run):
            said.append(logs.first_error(kfp, run))
        else:
            said.append(f"It {logs.ended_from_outside(kfp, run, steps.duration(made, ended))}")
        for text in said:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    elif steps.is_idle(run):
        console.print("There was nothing to process.")
