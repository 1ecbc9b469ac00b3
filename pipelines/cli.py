"""The client: parses the command line, calls one module, and prints the result."""

import collections.abc
import logging
import os
import shlex
import sys
import typing as tp

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

import tyro

from pipelines import arguments as a
from pipelines import called, settings
from pipelines.errors import ClusterError
from saev import interrupts, secrets
from saev.config.base import Config
from saev.console import Console
from saev.errors import ConfigError, SaevError

DESCRIPTION = """\
saev on Kubeflow Pipelines.

Settings come from flags, then the environment, then cluster.toml (see \
cluster.example.toml). Results are on standard output, everything else on standard error."""

FLAGS = "--flags="
_ERR = Console(stderr=True, markup=False)


def main(argv: collections.abc.Sequence[str] | None = None) -> None:
    """Entry point. Exits with 1 for an error, 2 for a wrong command line, 130 for Ctrl-C, and 143
    for SIGTERM."""
    try:
        argv = spread(sys.argv[1:] if argv is None else argv)
        secrets.refuse_in(argv)
        with interrupts.readers_may_leave():
            command = parse(argv or ["--help"])
            _log()
            interrupts.unwind()  # signals raise, so that the doctor's pod is deleted
            status = _run(command)
    except SaevError as err:
        sys.stderr.write(f"{called.NAME}: error: {err}\n")
        status = 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{called.NAME}: interrupted.\n")
        status = 130
    except interrupts.Terminated:
        sys.stderr.write(f"{called.NAME}: terminated.\n")
        status = 143
    sys.exit(status)


def spread(argv: collections.abc.Sequence[str]) -> list[str]:
    """Replace `--flags=TEXT`, which make passes on, by the words of TEXT, split as a shell does.

    Raises:
        ConfigError: a quote in TEXT is not closed.
    """
    words: list[str] = []
    for word in argv:
        if not word.startswith(FLAGS):
            words.append(word)
            continue
        try:
            words += shlex.split(word.removeprefix(FLAGS))
        except ValueError as err:
            raise ConfigError(
                f"FLAGS is {word.removeprefix(FLAGS)!r}: {err}. Correct the quotes."
            ) from None
    return words


def parse(argv: collections.abc.Sequence[str]) -> Config:
    """Parse a command line. Exits with status 2 if it is wrong."""
    return tyro.extras.subcommand_cli_from_dict(
        tp.cast(dict[str, tp.Callable[..., Config]], a.COMMANDS),
        prog=called.PROG,
        description=DESCRIPTION,
        args=list(argv),
    )


def _run(command: Config) -> int:
    """Carry out a command. Modules are imported when they are needed, because some take seconds."""
    if isinstance(command, a.Compile):
        return _compile(command)
    if isinstance(command, a.RunLocal):
        from pipelines import local_run

        print(local_run.run(command))  # noqa: T201 - the result
        return 0
    if isinstance(command, a.Submit):
        return _submit(command)
    if isinstance(command, a.Schedule):
        return _schedule(command)
    if isinstance(command, a.Show):
        return _show(command)
    if isinstance(command, a.Explorer):
        from pipelines import explorer

        explorer.show(_settings(command), port=command.port, browser=command.browser)
        return 0
    if isinstance(command, a.Doctor):
        from pipelines import doctor

        found = doctor.examine(_settings(command), _out(), pod=command.pod, dataset=command.dataset)
        return 0 if found else 1
    return _runs(command)


def _compile(command: a.Compile) -> int:
    from pathlib import Path

    from pipelines import prepare

    cluster = _settings(command)
    pipeline = prepare.compiled(command.pipeline, cluster, prepare.pods(cluster))
    if command.out == "-":
        sys.stdout.write(pipeline.text)
        return 0
    try:
        Path(command.out).write_text(pipeline.text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"Cannot write {command.out}: {err.strerror}.") from err
    print(command.out)  # noqa: T201 - the result
    return 0


def _show(command: a.Show) -> int:
    import contextlib

    from pipelines import pods_storage, show
    from saev import opened
    from saev.config.pages import OpenConfig

    given = _settings(command)
    reading = pods_storage.applied(given) if command.from_cluster else contextlib.nullcontext(given)
    with reading as cluster:
        place = show.place(command.run, cluster)
        opened.run(OpenConfig(url=place, port=command.port, browser=command.browser))
    return 0


def _submit(command: a.Submit) -> int:
    from pipelines import prepare, submit
    from pipelines.connect import connect
    from pipelines.doctor import machines

    cluster = _settings(command)
    job = prepare.job("saev", cluster, command.job, dataset=command.dataset)
    with connect(cluster) as kfp:
        if command.check:
            submit.check_storage(job.parameters["dataset"], job.parameters["root"])
        machines.check(cluster, kfp.pods, job.pods)
        submit.warn_of_others(kfp, job)
        run = submit.start(kfp, job, command.name)
        print(kfp.run_url(run.run_id), flush=True)  # noqa: T201 - the result
        if kfp.hint:
            _say(f"To open it: {kfp.hint}")
        if command.wait:
            return _wait(kfp, run.run_id, command.max_retries)
        _say(f"{called.by('status', run.run_id)}   shows its steps")
        _say(
            "If a pod is lost and Kubernetes does not replace it, the run is not retried: press "
            f"Retry in Kubeflow, or submit it again. {called.WAIT} retries automatically."
        )
        return 0


def _wait(kfp: tp.Any, run_id: str, max_retries: int = 0) -> int:
    from pipelines import watch

    try:
        watch.wait(kfp, run_id, _ERR, max_retries)
    except ClusterError as err:
        raise ClusterError(
            f"{err} The run goes on; `{called.by('watch', run_id)}` watches it again."
        ) from err
    except KeyboardInterrupt:
        _say(
            f"\nThe run goes on. `{called.by('watch', run_id)}` watches it again, "
            f"`{called.by('cancel', run_id)}` stops it."
        )
        return 130
    return 0


def _schedule(command: a.Schedule) -> int:
    import datetime

    from pipelines import cron, prepare, schedule, submit
    from pipelines.connect import connect
    from pipelines.doctor import machines

    when = cron.parse(command.cron)
    cluster = _settings(command)
    extra = {
        key: value
        for key in ("marker", "settle_minutes", "claim_hours")
        if (value := getattr(command, key)) not in (None, "")
    }
    job = prepare.job("saev-incoming", cluster, command.job, dataset=command.dataset, extra=extra)
    name = command.name or schedule.default_name(job.parameters["dataset"])
    with connect(cluster) as kfp:
        if command.check:
            submit.check_storage(job.parameters["dataset"], job.parameters["root"], is_prefix=True)
        machines.check(cluster, kfp.pods, job.pods)
        made = schedule.create(kfp, job, name, when, wait=command.wait)
    print(name)  # noqa: T201 - the result
    firings = ", ".join(
        f"{time:%Y-%m-%d %H:%M:%S}" for time in when.next(datetime.datetime.now(datetime.UTC), 3)
    )
    _say(f"Schedule {name} ({made.recurring_run_id}) fires at {firings} UTC.")
    return 0


def _runs(command: Config) -> int:
    """Carry out a command about existing runs or schedules."""
    from pipelines import logs, runs, schedule, steps
    from pipelines.connect import connect

    if isinstance(command, a.Cancel) and not command.run:
        raise ConfigError(
            f"No run is named. `{called.by('list')}` shows them; `{called.by('cancel', '…')}`."
        )
    if isinstance(command, a.Unschedule) and not command.name:
        raise ConfigError(
            f"No schedule is named. `{called.by('schedules')}` shows them; "
            f"`{called.by('unschedule', '…')}`."
        )
    with connect(_settings(command)) as kfp:
        if isinstance(command, a.Schedules):
            schedule.show(schedule.existing(kfp), _out())
        elif isinstance(command, a.Unschedule):
            ids = schedule.delete(kfp, command.name, wait=command.wait, force=command.force)
            for deleted in ids:
                _say(f"Schedule {command.name} ({deleted}) is deleted.")
        elif isinstance(command, a.List):
            runs.show_list(kfp, runs.recent(kfp, command.n), _out())
        elif isinstance(command, a.Cancel):
            run = runs.find(kfp, command.run)
            if runs.cancel(kfp, run):
                _say(f"{run.display_name} is being canceled; its finished work is kept.")
            else:
                _say(f"{run.display_name} is over already: {steps.state_of(run)}.")
        elif isinstance(command, a.Status | a.Watch | a.Logs):
            run = runs.find(kfp, command.run)
            if isinstance(command, a.Status):
                runs.show_status(kfp, run, _out())
            elif isinstance(command, a.Watch):
                return _wait(kfp, run.run_id)
            else:
                logs.show(kfp, run, command.step, command.tail, _out())
    return 0


def _settings(command: tp.Any) -> settings.Settings:
    """The settings; the command's flags come before the other sources."""
    flags = command.cluster.model_dump(exclude={"cluster_file"})
    if hasattr(command, "images"):
        flags |= command.images.model_dump()
    if root := getattr(command, "root", "") or (hasattr(command, "job") and command.job.root):
        flags["root"] = root
    return settings.load(flags, command.cluster.cluster_file)


def _out() -> Console:
    """Standard output. It is 200 columns wide if it is no terminal."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=200, markup=False)


def _say(text: str) -> None:
    _ERR.print(text, highlight=False, markup=False, soft_wrap=True)


def _log() -> None:
    """Show our messages without a prefix, and only errors of libraries."""
    logging.basicConfig(level="ERROR", format="%(message)s")
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(secrets.RedactingFilter())
    for name in ("pipelines", "saev.opened"):
        logger = logging.getLogger(name)
        logger.setLevel(os.environ.get("SAEV_LOG_LEVEL", "INFO").upper())
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("urllib3").setLevel("CRITICAL")
