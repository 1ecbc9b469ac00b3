"""Decides what may be deleted, and what is kept although it was asked for, each with the reason."""

import dataclasses
import typing as tp
from collections.abc import Iterator

from saev import storage
from saev.config.gc import GcConfig, seconds
from saev.errors import ConfigError
from saev.gc.facts import CLOSING, Facts, Inference, Run
from saev.gc.scan import SHARDS, Folder

Kind = tp.Literal["shards", "run", "inference", "resume", "parts", "temporary"]
State = tp.Literal["complete", "incomplete", "left over"]


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that the command line asks to delete."""

    url: str
    kind: Kind
    state: State
    reason: str
    """Why it may be deleted."""
    n_bytes: int
    n_files: int
    modified: float
    """Newest change, seconds since the epoch."""
    tag: str = ""
    kept: str = ""
    """Why it is kept nevertheless; empty if it may be deleted."""
    after: frozenset[str] = frozenset()
    """URLs of runs that have to be deleted before."""


def choose(cfg: GcConfig, facts: Facts, now: float) -> list[Item]:
    """Everything that the config asks for, in the order in which it has to be deleted.

    Args:
        cfg: the command line.
        facts: what is below the root.
        now: seconds since the epoch.

    Raises:
        ConfigError: --shards names a folder that is not there.
    """
    return _Choice(cfg, facts, now).items()


class _Choice:
    def __init__(self, cfg: GcConfig, facts: Facts, now: float):
        self.cfg, self.facts, self.now = cfg, facts, now
        self.grace, self.older = seconds(cfg.grace), seconds(cfg.older_than)
        self.only_runs = bool(cfg.tag) and not cfg.shards
        self.only_shards = bool(cfg.shards) and not cfg.tag

    def items(self) -> list[Item]:
        """In the order of deletion. An item is deleted before the items that it refers to."""
        self._check_names()
        runs = {name: item for name, item in self._runs() if self._is_old(item)}
        going = {name for name, item in runs.items() if not item.kept}
        resume = list(self._resume(going))
        shards = list(self._shards(going))
        parts = [*self._parts(going), *self._inference(going)]
        chosen = [i for i in (*parts, *resume, *runs.values(), *shards) if self._is_old(i)]
        temporaries = self._temporaries([i.url for i in chosen if not i.kept])
        return [*filter(self._is_old, temporaries), *chosen]

    # --- Runs ------------------------------------------------------------------------------

    def _runs(self) -> Iterator[tuple[str, Item]]:
        for name, run in self.facts.runs.items():
            if not self._wants_run(run):
                continue
            if run.complete:
                if self.cfg.incomplete or not (self.cfg.tag or self.cfg.older_than):
                    continue
                reason = f"tag {run.tag}" if self.cfg.tag else "old"
            else:
                reason = f"no {CLOSING['run']}"
            yield name, self._item("run", run.folder, reason, self._run_modified(name), run)

    def _wants_run(self, run: Run) -> bool:
        return not self.only_shards and (not self.cfg.tag or run.tag == self.cfg.tag)

    def _run_modified(self, name: str) -> float:
        """When a run, or the group that it is trained in, was changed last."""
        groups = [g for g, names in self.facts.groups.items() if name in names]
        own = self.facts.runs[name].folder.modified
        return max([own, *map(self._group_modified, groups)])

    def _group_modified(self, group: str) -> float:
        runs = [self.facts.runs[n] for n in self.facts.groups[group] if n in self.facts.runs]
        points = self.facts.snapshot.resume[group]
        return max([points.modified, *(run.folder.modified for run in runs)])

    def _resume(self, going: set[str]) -> Iterator[Item]:
        """Resume points of complete runs, and of runs that are deleted too."""
        for group, folder in self.facts.snapshot.resume.items():
            names = self.facts.groups[group]
            runs = [self.facts.runs[n] for n in names if n in self.facts.runs]
            pending = {n for n in names if n not in self.facts.runs} | {
                r.folder.name for r in runs if not r.complete
            }
            if self.only_shards or (self.cfg.tag and not (names and names <= going)):
                continue
            if not names:
                reason, state = "no readable resume point", "incomplete"
            elif pending:
                reason, state = f"of {len(pending)} unfinished runs", "incomplete"
            else:
                reason, state = "its runs are complete", "left over"
            modified = self._group_modified(group)
            yield self._make("resume", tp.cast(State, state), folder, reason, modified)

    def _inference(self, going: set[str]) -> Iterator[Item]:
        """Unfinished results below runs that are kept."""
        for name, run in self.facts.runs.items():
            if name in going or not self._wants_run(run):
                continue
            for one in run.inference:
                if not one.complete:
                    reason = f"no {CLOSING['inference']}"
                    yield self._item("inference", one.folder, reason, one.folder.modified, one)

    # --- Shards ----------------------------------------------------------------------------

    def _shards(self, going: set[str]) -> Iterator[Item]:
        for name, folder in self.facts.snapshot.shards.items():
            if self.only_runs or (self.cfg.shards and name not in self.cfg.shards):
                continue
            complete = folder.has(CLOSING["shards"])
            named = bool(self.cfg.shards or self.cfg.older_than) and not self.cfg.incomplete
            if complete and not named:
                continue
            reason = f"no {CLOSING['shards']}"
            if complete:
                reason = "named" if self.cfg.shards else "old, no run that stays refers to it"
            state: State = "complete" if complete else "incomplete"
            item = self._make("shards", state, folder, reason, folder.modified)
            yield self._with_references(item, name, going)

    def _with_references(self, item: Item, name: str, going: set[str]) -> Item:
        referring = {n for n, run in self.facts.runs.items() if name in run.shards}
        kept = item.kept
        if referring - going:
            kept = f"run {min(referring - going)} refers to it"
        elif item.state == "complete" and not kept:
            kept = self._unknown_references(going)
        if not kept and self.facts.held.of_dataset(self.facts.datasets[name]):
            kept = "a pipeline run has claimed its dataset"
        after = frozenset(self.facts.runs[n].folder.url for n in referring & going)
        return dataclasses.replace(item, kept=kept, after=after)

    def _unknown_references(self, going: set[str]) -> str:
        """Why complete shards may be in use although no run refers to them; "" if they are not."""
        runs = self.facts.runs
        silent = [n for n, r in runs.items() if r.complete and not r.readable and n not in going]
        if silent:
            return f"run {min(silent)} does not say which shards it refers to"
        active = [
            *(n for n, run in runs.items() if not run.complete and self._is_fresh(run.folder)),
            *(g for g, folder in self.facts.snapshot.resume.items() if self._is_fresh(folder)),
        ]
        return f"run {min(active)} may be training on it" if active else ""

    def _parts(self, going: set[str]) -> Iterator[Item]:
        """Folders of parts that a finished stage did not delete, because it was killed."""
        owners: list[tuple[str, Folder]] = []
        for name, folder in self.facts.snapshot.shards.items():
            wanted = not self.only_runs and (not self.cfg.shards or name in self.cfg.shards)
            if wanted and folder.has(CLOSING["shards"]):
                owners.append(("shards", folder))
        for name, run in self.facts.runs.items():
            if name not in going and self._wants_run(run):
                owners += [("inference", one.folder) for one in run.inference if one.complete]
        for kind, folder in owners:
            parts = folder.folders().get("parts")
            if parts is not None:
                reason = f"{CLOSING[kind]} is there"
                yield self._make("parts", "left over", parts, reason, parts.modified)

    # --- Temporary files -------------------------------------------------------------------

    def _temporaries(self, going: list[str]) -> Iterator[Item]:
        if self.cfg.tag or self.cfg.shards:
            return
        for url, o in self.facts.snapshot.temporaries.items():
            if any(url.startswith(folder + "/") for folder in going):
                continue
            item = Item(url, "temporary", "left over", "unfinished write", o.size, 1, o.modified)
            yield dataclasses.replace(item, kept=self._freshness(o.modified))

    # --- Age and claims --------------------------------------------------------------------

    def _item(
        self,
        kind: tp.Literal["run", "inference"],
        folder: Folder,
        reason: str,
        modified: float,
        owner: Run | Inference,
    ) -> Item:
        state: State = "complete" if owner.complete else "incomplete"
        item = self._make(kind, state, folder, reason, modified)
        datasets = {self.facts.datasets.get(name, "") for name in owner.shards} or {""}
        claimed = any(self.facts.held.of_dataset(url) for url in datasets)
        if claimed and not item.kept:
            item = dataclasses.replace(item, kept="a pipeline run that holds a claim may go on")
        return dataclasses.replace(item, tag=owner.tag if isinstance(owner, Run) else "")

    def _make(self, kind: Kind, state: State, folder: Folder, reason: str, modified: float) -> Item:
        kept = "a symbolic link" if folder.is_link else self._freshness(modified)
        if not kept and kind == "resume" and self.facts.held.of_dataset(""):
            kept = "a pipeline run that holds a claim may go on"
        n_files = len(folder.objects)
        return Item(folder.url, kind, state, reason, folder.n_bytes, n_files, modified, kept=kept)

    def _is_old(self, item: Item) -> bool:
        return self.now - item.modified >= self.older

    def _is_fresh(self, folder: Folder) -> bool:
        return self.now - folder.modified < self.grace

    def _freshness(self, modified: float) -> str:
        if self.now - modified >= self.grace:
            return ""
        return f"changed {age(self.now - modified)} ago, within the grace of {self.cfg.grace}"

    def _check_names(self) -> None:
        missing = [name for name in self.cfg.shards if name not in self.facts.snapshot.shards]
        if missing:
            place = storage.join(self.facts.snapshot.url, SHARDS)
            raise ConfigError(
                f"There is no shards folder {missing[0]} in {place}. --shards takes the names of "
                "folders there, 16 hexadecimal digits each."
            )


def age(span: float) -> str:
    """A time span in one unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if span >= 2 * length:
            return f"{span / length:.0f} {unit}"
    return f"{max(span, 0):.0f} s"
