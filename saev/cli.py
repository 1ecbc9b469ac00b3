"""The command line: parse, call one stage, print the URL of its result.

Stages are imported only when they run, so that `saev --help` answers at once.
"""

import os
import sys
import time
import typing as tp

# Pydantic's links to its website do not help the user of a command.
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

import tyro

from saev import chain, cores, driver, interrupts, secrets, shorthand, torchrun, usage
from saev.config.base import Config, FlagError, of_flags
from saev.config.gc import GcConfig
from saev.config.look import LookConfig
from saev.config.pages import NotebookConfig, OpenConfig, ReportConfig, ServeConfig
from saev.config.run import RunConfig
from saev.config.size import SizeConfig
from saev.config.steps import STEPS
from saev.errors import SaevError, did_you_mean
from saev.progress import Progress, log_to
from saev.stage import Job

COMMANDS: dict[str, tp.Callable[..., tp.Any]] = {
    **{stage.name: stage.config for stage in chain.STAGES},
    "run": RunConfig,
    "size": SizeConfig,
    "gc": GcConfig,
    "open": OpenConfig,
    "serve": ServeConfig,
    "report": ReportConfig,
    "look": LookConfig,
    "notebook": NotebookConfig,
}

DESCRIPTION = """\
Sparse autoencoders for vision transformers.

Four stages, each of which continues where it stopped and skips what is done: record activations \
(shards), train SAEs on them (train), measure SAEs (inference), show their features (visuals). \
`run` does all four, `serve` shows the SAEs of a root in the browser, `open` one of them, \
`report` writes the page of a root, or one file with all latents of SAEs, \
`look` prints the latents of images of your own, `notebook` writes a notebook. \
`size` estimates a job beforehand, `gc` cleans up. Every location is a path or a URL (s3://…). \
The URL of the result is the only output on standard output."""


STEP_DESCRIPTION = """\
One step of the pipeline on a cluster, as its pods call it. JSON texts may be long. Lists and \
results are written to the files of the flags --to-…."""


def step() -> tp.NoReturn:
    """One step of the pipeline on a cluster; `saev step --help` lists them."""
    raise AssertionError("saev step has a parser of its own")


COMMANDS["step"] = step


def parse(argv: tp.Sequence[str]) -> tp.Any:
    """Parse a command line to a config. Exits with status 2 if it is wrong."""
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        hint = did_you_mean(argv[0], COMMANDS)
        _fail(f"There is no command {argv[0]!r}.{hint} There are {', '.join(COMMANDS)}.", 2)
    try:
        with of_flags():
            return _parse(argv)
    except FlagError as err:
        _fail(_about_flags(err, argv), 2)


def _about_flags(err: FlagError, argv: tp.Sequence[str]) -> str:
    """The message about wrong flags, with the names that the user typed."""
    names = [word.split("=", 1)[0] for word in argv if word.startswith("--")]
    typed = {name[2:].rpartition(".")[2].replace("-", "_"): name for name in names}
    lines = []
    for key, text in err.wrong:
        name = typed.get(key.partition(".")[0])
        lines.append(f"{name}: {text}" if name else f"{key}: {text}" if key else text)
    command = " ".join(argv[: 2 if argv[0] == "step" else 1])
    return f"{'; '.join(lines).rstrip('.')}. `saev {command} --help-all` explains the flags."


def _parse(argv: tp.Sequence[str]) -> tp.Any:
    if usage.wants(argv):
        usage.show(argv, COMMANDS, DESCRIPTION)
    argv = [usage.SHORT if word == usage.ALL else word for word in shorthand.expand(argv)]
    if argv[:1] == ["step"]:
        return tyro.extras.subcommand_cli_from_dict(
            dict(STEPS),
            prog="saev step",
            description=STEP_DESCRIPTION,
            args=list(argv[1:]) or ["--help"],
        )
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="saev",
        description=DESCRIPTION,
        args=_joined(argv) if argv[:1] in _MANY_RUNS else argv,
        # Flags of a stage may also follow `data:…`, because users append flags there.
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


_MANY_RUNS = (["inference"], ["visuals"], ["report"])
"""Commands with a flag --run for several runs."""


def _joined(argv: tp.Sequence[str], flag: str = "--run") -> list[str]:
    """Put the values of a flag that is given several times together: tyro takes the last ones."""
    values: list[str] = []
    others: list[str] = []
    into = others
    for word in argv:
        name, equals, value = word.partition("=")
        if name == flag:
            into = values
            values += [value] if equals else []
        else:
            into = others if word.startswith("--") else into
            into.append(word)
    return [*others, flag, *values] if values else list(argv)


_WITHOUT_BARS = (GcConfig, OpenConfig, ServeConfig)
"""Commands that ask a question or wait for the user, and so show no progress."""


class Made(tp.NamedTuple):
    """The result of a command."""

    urls: tp.Sequence[str] = ()
    """URLs of the results."""
    go_on: str = ""
    """The next command for the user."""


def stage(cfg: tp.Any, argv: tp.Sequence[str], progress: Progress) -> tp.Callable[[], Made]:
    """Import the code of a config's command. Returns a function that runs it."""
    for one in chain.STAGES:
        if isinstance(cfg, one.config):
            kind = one.kind
            sweep = {"explicit": explicit_keys(argv)} if one.swept else {}
            return lambda: _one_stage(kind(cfg, **sweep), cfg, progress)
    if isinstance(cfg, tuple(STEPS.values())):
        from saev.steps import step

        return lambda: Made(step.do(cfg, progress=progress))
    if isinstance(cfg, SizeConfig):
        from saev import size

        return lambda: _no_urls(size.print_sizes, cfg)
    if isinstance(cfg, GcConfig):
        from saev import gc

        return lambda: _no_urls(gc.clean_up, cfg)
    if isinstance(cfg, LookConfig):
        from saev import look

        return lambda: _no_urls(look.show, cfg)
    if isinstance(cfg, OpenConfig):
        from saev.serve import command

        return lambda: _no_urls(command.open_one, cfg)
    if isinstance(cfg, ServeConfig):
        from saev.serve import command

        return lambda: _no_urls(command.run, cfg)
    if isinstance(cfg, ReportConfig) and cfg.run:
        from saev.explorer import page

        return lambda: Made([page.write(cfg, progress)])
    if isinstance(cfg, ReportConfig):
        from saev.visuals import overview

        return lambda: _page(overview.report(cfg.root), cfg)
    if isinstance(cfg, NotebookConfig):
        from saev import notebook

        return lambda: Made([notebook.write(cfg)], notebook.how_to_open(cfg))
    from saev import run

    return lambda: _page(run.run(cfg, progress=progress), cfg)


def _one_stage(job: Job, cfg: tp.Any, progress: Progress) -> Made:
    """Run a stage and print its metrics."""
    from saev import after

    started, part = time.monotonic(), getattr(cfg, "part", "")
    try:
        urls = driver.run_job(job, part, progress).urls
    except SaevError:
        if job.failure() is not None and not part:  # some SAEs failed, and the others are done
            after.of(cfg, ()).update_page()
        raise
    if part or progress.quiet:
        return Made(urls)
    outcome = after.of(cfg, urls)
    progress.say(outcome.figures(time.monotonic() - started))
    outcome.update_page()
    return Made(urls, outcome.go_on())


def _page(page: str, cfg: Config) -> Made:
    from saev import after

    return Made([page], after.of(cfg, [page]).go_on())


def _no_urls(command: tp.Callable[[tp.Any], None], cfg: tp.Any) -> Made:
    """Run a command that prints its own output."""
    command(cfg)
    return Made()


def explicit_keys(argv: tp.Sequence[str]) -> frozenset[str]:
    """Dotted config keys that a command line sets, also to their default values.

    A sweep must not override them.
    """
    keys = set()
    for word in argv:
        if word.startswith("--"):
            flag = word[2:].split("=", 1)[0].replace("-", "_")
            head, _, last = flag.rpartition(".")
            last = last.removeprefix("no_")
            keys.add(f"{head}.{last}" if head else last)
            if flag.startswith("no_"):
                keys.add(flag.removeprefix("no_"))
        elif ":" in word and "/" not in word and not word.startswith("-"):
            keys.add(word.split(":", 1)[0].replace("-", "_") + ".kind")
    return frozenset(keys)


def main(argv: tp.Sequence[str] | None = None) -> None:
    """Entry point of `saev`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with interrupts.readers_may_leave():
        secrets.refuse_in(argv)
        cfg = parse(argv or [usage.SHORT])
        argv = shorthand.expand(argv)
    cores.limit_threads()
    try:
        rank = _rank()
        progress = Progress(quiet=rank > 0 or isinstance(cfg, _WITHOUT_BARS))
        log_to(progress, rank)
        made = _work(cfg, argv, progress)
    except SaevError as err:
        _fail(str(err), 1)
    except KeyboardInterrupt:
        _fail("Interrupted. The same command continues from here.", 130)
    except interrupts.Terminated:
        _fail("Terminated. The same command continues from here.", 143)
    except BrokenPipeError:
        _fail("The reader of standard output has closed it.", interrupts.BROKEN_PIPE)
    except ModuleNotFoundError as err:
        package = (err.name or "saev").partition(".")[0]
        if package == "saev":
            raise
        _fail(
            f"`saev {argv[0]}` needs {package}, which is not installed. In a container: use the "
            "image saev, because saev-cpu has only what discovering and reporting need. "
            "Elsewhere: install saevit with its dependencies.",
            1,
        )
    with interrupts.readers_may_leave():
        for url in made.urls if rank == 0 else ():
            print(url)  # noqa: T201 - the one thing on standard output
        sys.stdout.flush()  # before the next line on stderr
    if made.go_on:
        progress.say(f"Next: {made.go_on}")


def _work(cfg: tp.Any, argv: tp.Sequence[str], progress: Progress) -> Made:
    """Run a config's command. In a pod, tell the supervisor about errors."""
    try:
        with progress:
            call = stage(cfg, argv, progress)
            interrupts.unwind()
            return call()
    except BaseException as err:
        if "SAEV_LAST_WORD" in os.environ:
            from saev.steps import last_word

            last_word.tell(err)
        raise


def _rank() -> int:
    """Rank of this process if torchrun started it, else 0. Only rank 0 prints."""
    place = torchrun.place()
    return 0 if place is None else place.rank


def _fail(message: str, status: int) -> tp.NoReturn:
    kind = "error: " if status in (1, 2) else ""
    sys.stderr.write(f"saev: {kind}{message}\n")
    sys.exit(status)
