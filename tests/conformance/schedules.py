"""A schedule that fires every minute, and datasets that come, grow, are broken or not complete."""

import itertools
import re
import typing as tp

from conformance.cluster import Cluster, with_settings
from conformance.jobs import RUN_SECONDS, Jobs
from conformance.table import Check, Failed
from pipelines import cron, schedule, steps
from saev import storage

MINUTES = 25.0
MARKER = "_SUCCESS"


class Incoming:
    """A prefix of datasets and its schedule."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.prefix = cluster.data("incoming")
        self.jobs = Jobs(cluster, "incoming")
        self.name = f"saev-conformance-{cluster.id}"

    def pictures(self, name: str, first: int, count: int, *, marker: bool = True) -> None:
        """Write a dataset, or more of it."""
        place = storage.join(self.prefix, name)
        self.cluster.storage(place, "pictures", str(first), str(count))
        if marker:
            self.cluster.storage(storage.join(place, MARKER), "write", "")

    def make(self, cluster: Cluster, when: str) -> tp.Any:
        """`make schedule`."""
        job = cluster.job(
            "saev-incoming", self.prefix, self.jobs.config(), extra={"marker": MARKER}
        )
        cluster.upload(job)
        return schedule.create(self.cluster.kfp, job, self.name, cron.parse(when))

    def processed(self) -> dict[str, int]:
        """Dataset → how many of its states are processed."""
        found = (
            re.match(r"datasets/([a-z]+)-[0-9a-f]{8}/processed/", key)
            for key in self.cluster.keys("out")
        )
        names = [match[1] for match in found if match]
        return {name: names.count(name) for name in ("new", "growing", "broken", "unmarked")}

    def runs(self, recurring: str) -> list[tp.Any]:
        """Runs that the schedule started, oldest first."""
        mine = [run for run in self.cluster.mine() if run.recurring_run_id == recurring]
        return sorted(mine, key=lambda run: run.created_at)

    def started(self) -> dict[str, int]:
        """Dataset → how many runs the firings started for it."""
        given = [run.runtime_config.parameters or {} for run in self.cluster.mine()]
        names = [storage.name(values["dataset"]) for values in given if values.get("claim")]
        return {name: names.count(name) for name in sorted(set(names))}

    def fired(self) -> str:
        """New and growing datasets are processed once per state, the others never."""
        cluster = self.cluster
        self.pictures("new", 100, 24)
        self.pictures("growing", 200, 24)
        self.pictures("broken", 300, 24)
        bad = storage.join(self.prefix, "broken", "class-0", "00304.png")
        cluster.storage(bad, "write", "this is no picture")
        self.pictures("unmarked", 400, 24, marker=False)
        made = self.make(cluster, "0 * * * * *")
        wanted = {"new": 1, "growing": 1, "broken": 0, "unmarked": 0}
        self._reach(wanted)
        self.pictures("growing", 224, 6, marker=False)
        wanted["growing"] = 2
        self._reach(wanted)
        with cluster.kfp.explained("switch off the schedule"):
            cluster.kfp.recurring.recurring_run_service_disable_recurring_run(made.recurring_run_id)
        runs = self.runs(made.recurring_run_id)
        for run in runs:
            cluster.run_ids.append(run.run_id)
            cluster.end(run.run_id, RUN_SECONDS)  # a schedule is replaced when its firings are over
        runs = self.runs(made.recurring_run_id)
        overlap = [
            (a.display_name, b.display_name)
            for a, b in itertools.pairwise(runs)
            if not (end := steps.real_time(a.finished_at)) or end > steps.real_time(b.created_at)
        ]
        if overlap:
            raise Failed(f"runs overlapped: {overlap}")
        if self.processed() != wanted:
            raise Failed(f"processed: {self.processed()}, expected {wanted}")
        started, expected = self.started(), {"broken": 1, "growing": 2, "new": 1}
        if started != expected:
            raise Failed(f"runs that the firings started: {started}, expected {expected}")
        return (
            f"{len(runs)} firings, none side by side; a run for new, for each state of growing "
            "and for broken, which fails for good and is not tried again; none for unmarked"
        )

    def _reach(self, wanted: dict[str, int]) -> None:
        def look() -> bool | None:
            found = self.processed()
            too_many = {name for name in found if found[name] > wanted[name]}
            if too_many:
                raise Failed(f"processed too often: {', '.join(sorted(too_many))}")
            return found == wanted or None

        self.cluster.until(60 * MINUTES, f"processed {self.processed()}, not {wanted},", look, 10)

    def replaced(self) -> str:
        """After an upgrade, the same command replaces the schedule, and its pipeline's version."""
        cluster = self.cluster
        old = self.make(cluster, "0 0 3 1 1 *")
        compiled = {**cluster.settings.compile, "parallelism": 3, "retries": 2}
        new = self.make(with_settings(cluster, compile=compiled), "0 0 3 1 1 *")
        mine = [s for s in schedule.existing(cluster.kfp) if s.display_name == self.name]
        ids = [item.recurring_run_id for item in mine]
        if ids != [new.recurring_run_id]:
            raise Failed(f"schedules of this name: {ids}, expected {new.recurring_run_id}")
        starts = [item.runtime_config.parameters["start"] for item in (old, new)]
        before, after = (start["version_id"] for start in starts)
        if before == after:
            raise Failed("the schedule still starts runs of the old pipeline's version")
        schedule.delete(cluster.kfp, self.name)
        if any(s.display_name == self.name for s in schedule.existing(cluster.kfp)):
            raise Failed("the deleted schedule is still listed")
        return "one schedule of the name, with the new version; deleted"


def checks(cluster: Cluster, *, quick: bool) -> list[Check]:
    """In their order."""
    incoming = Incoming(cluster)
    found = [Check("upgrade: an old schedule", incoming.replaced)]
    if not quick:
        found.insert(0, Check("schedule: every minute", incoming.fired))
    return found
