"""The command: lists, asks, deletes, and prints what was done."""

import dataclasses
import io
import json
import logging
import sys
import time
import typing as tp

import rich.box
import rich.table

from saev import storage
from saev.config.gc import GcConfig
from saev.console import for_tables, size
from saev.errors import SaevError, StorageError
from saev.gc import facts
from saev.gc.choose import Item, age, choose
from saev.gc.remove import Outcome, remove
from saev.gc.scan import scan
from saev.secrets import redact

logger = logging.getLogger(__name__)

INDEX = "index.html"


@dataclasses.dataclass
class Report:
    """What was found and done."""

    root: str
    items: list[Item]
    """Items in the order of their deletion."""
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    """What happened to each item, by its URL."""
    failures: list[str] = dataclasses.field(default_factory=list)
    """One sentence each."""

    @property
    def going(self) -> list[Item]:
        """The items that may be deleted."""
        return [item for item in self.items if not item.kept]


def clean_up(cfg: GcConfig) -> None:
    """List, and delete if ``cfg.delete`` is set. Prints to standard output.

    Raises:
        ConfigError: the URL is not a root, or --shards names a folder that is not there.
        StorageError: something cannot be listed or deleted. Everything else is deleted.
    """
    report = _look(cfg)
    if not cfg.as_json:
        sys.stdout.write(render(report, time.time()))
        sys.stdout.flush()
    if cfg.delete and report.going and (cfg.yes or _agrees(report)):
        report = _again(cfg, report)
        _delete(report)
    if cfg.as_json:
        text = json.dumps(to_dict(report), indent=1, ensure_ascii=False)
        sys.stdout.write(redact(text) + "\n")
    elif cfg.delete:
        sys.stdout.write(_summary(report))
    if report.failures:
        more = f" ({len(report.failures)} such errors)" if len(report.failures) > 1 else ""
        raise StorageError(report.failures[0] + more)


def _look(cfg: GcConfig) -> Report:
    snapshot = scan(cfg.root)
    return Report(snapshot.url, choose(cfg, facts.gather(snapshot), time.time()))


def _agrees(report: Report) -> bool:
    """Whether the person at the terminal says yes. Without a terminal, --delete is enough."""
    if not sys.stdin.isatty():
        return True
    n_bytes = sum(item.n_bytes for item in report.going)
    sys.stderr.write(f"Delete these {len(report.going)} ({size(n_bytes)})? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _again(cfg: GcConfig, shown: Report) -> Report:
    """Look again, because the answer may have come late. Only items that were shown are deleted."""
    known = {item.url for item in shown.going}
    report = _look(cfg)
    report.items = [item for item in report.items if item.kept or item.url in known]
    return report


def _delete(report: Report) -> None:
    for item in report.going:
        if any(report.outcomes.get(url) not in ("deleted", "gone") for url in item.after):
            report.outcomes[item.url] = "in use"
            continue
        try:
            report.outcomes[item.url] = remove(item)
        except StorageError as err:
            report.failures.append(str(err))
            continue
        logger.info("%s %s: %s", item.kind, item.url, report.outcomes[item.url])
    if any(report.outcomes.get(i.url) == "deleted" for i in report.items if i.kind == "run"):
        _rewrite_index(report.root)


def _rewrite_index(root: str) -> None:
    """Write the page that lists the runs again, without the deleted ones, if there is a page."""
    if not storage.exists(storage.join(root, INDEX)):
        return
    from saev.visuals import overview

    try:
        if overview.may_write(root):
            overview.write(root)
    except SaevError as err:
        logger.warning("%s still lists what was deleted: %s", storage.join(root, INDEX), err)


# --- Showing -------------------------------------------------------------------------------


def render(report: Report, now: float) -> str:
    """A table of the items that may be deleted, and one of the items that are kept."""
    going, kept = report.going, [item for item in report.items if item.kept]
    out = io.StringIO()
    console = for_tables(out)
    if going:
        n_bytes = sum(item.n_bytes for item in going)
        title = f"May be deleted below {report.root}: {len(going)}, {size(n_bytes)}"
        console.print(_table(title, "why", going, lambda i: i.reason, report.root, now))
    else:
        console.print(f"Nothing to delete below {report.root}.", soft_wrap=True)
    if kept:
        console.print(_table("Kept", "because", kept, lambda i: i.kept, report.root, now))
    return out.getvalue()


def _table(
    title: str,
    why: str,
    items: list[Item],
    reason: tp.Callable[[Item], str],
    root: str,
    now: float,
) -> rich.table.Table:
    table = rich.table.Table(
        title=title, title_justify="left", title_style="", box=rich.box.SIMPLE_HEAD
    )
    table.add_column("what", overflow="fold")
    table.add_column("where", no_wrap=True, overflow="fold")
    table.add_column("tag", overflow="fold")
    for name in ("age", "files", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(why, overflow="fold")
    for item in items:
        table.add_row(
            item.kind if item.state == "left over" else f"{item.state} {item.kind}",
            item.url.removeprefix(root).lstrip("/"),
            item.tag,
            age(now - item.modified),
            f"{item.n_files:,}",
            size(item.n_bytes),
            reason(item),
        )
    return table


def _summary(report: Report) -> str:
    deleted = [i for i in report.going if report.outcomes.get(i.url) == "deleted"]
    if not report.outcomes and not report.failures:
        return "Nothing was deleted.\n"
    lines = [f"Deleted {len(deleted)}, {size(sum(i.n_bytes for i in deleted))}."]
    words = {
        "changed": "it changed since it was listed",
        "in use": "it is in use",
        "gone": "it was gone already",
    }
    lines += [
        f"Not {item.url}: {words[outcome]}."
        for item in report.going
        if (outcome := report.outcomes.get(item.url)) in words and outcome is not None
    ]
    return "\n".join(lines) + "\n"


def to_dict(report: Report) -> dict[str, tp.Any]:
    """As plain JSON types."""
    rows = []
    for item in report.items:
        row = {k: v for k, v in dataclasses.asdict(item).items() if k != "after"}
        rows.append(row | {"outcome": report.outcomes.get(item.url, "")})
    return {
        "root": report.root,
        "n_bytes": sum(item.n_bytes for item in report.going),
        "items": rows,
        "failures": report.failures,
    }
