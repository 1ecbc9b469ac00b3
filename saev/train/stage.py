"""The training stage. An item is a group of SAEs that share their batches."""

import functools
import logging
import typing as tp
from collections.abc import Sequence

from saev import driver, storage, torchrun
from saev.config import TrainConfig
from saev.config.train import RUN
from saev.errors import ConfigError, IncompleteError
from saev.nn.ranks import ALONE, Ranks
from saev.progress import Progress
from saev.stage import Context, Item, Job, Result
from saev.train import curves, launch, outlook, resume
from saev.train.members import Group, Member, digest, unpublished
from saev.train.resolve import groups
from saev.train.team import Team, alone, join, n_ranks
from saev.train.trainer import Trainer

logger = logging.getLogger(__name__)


def plan(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[dict[str, tp.Any]]:
    """One work item per group of SAEs that share their batches; plain JSON.

    Reads the sweep file and the shards' metadata. Looks for runs and resume points of earlier
    versions and sweeps, because these keep their names. Apart from that, equal inputs give equal
    items, whatever is already done.

    Args:
        cfg: what to train.
        explicit: config keys that the command line set, which a sweep does not override.
        table: the sweep, if it is not a file.

    Raises:
        ConfigError: a key, a value or a combination is wrong.
        StorageError: the shards cannot be read.
    """
    return [group.to_item() for group in Training(cfg, explicit, table).groups]


def work(
    cfg: TrainConfig, item: tp.Mapping[str, tp.Any], progress: Progress | None = None
) -> list[str]:
    """Train the SAEs of one item that are not published yet; returns the URLs of all of its runs.

    Continues from the newest resume point. A run folder is published when its run.json is written.
    After that, the group's resume points are deleted. Starts one process per GPU if there are
    several (:func:`saev.train.team.n_ranks`). If torchrun or a similar launcher started several
    processes, each of them does its part, and all return the same URLs.

    Raises:
        ConfigError: the loss is not finite any more; the message names the run, step and remedy. Or
            this is one of several machines, and no launcher gave it a rank.
        StorageError: data cannot be read or results cannot be written.
        RankError: another rank ended.
    """
    del cfg  # an item has the resolved configs of its members
    group = Group.from_item(item)
    job = Training(group.members[0].config)
    job.groups = [group]
    driver.do_items(job, job.items(), progress)
    return list(job.urls)


def finish(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[str]:
    """URLs of all runs, in the sweep's order.

    Raises:
        IncompleteError: names the runs that are not published.
    """
    return list(driver.finish(Training(cfg, explicit, table)).urls)


def run(
    cfg: TrainConfig,
    progress: Progress | None = None,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[str]:
    """Train everything that ``cfg`` asks for and is not there yet; returns the run folders."""
    return list(driver.run_job(Training(cfg, explicit, table), progress=progress).urls)


class Training(Job):
    """Every SAE that a config and its sweep ask for, each published as a run of its own.

    Args:
        cfg, explicit, table: see :func:`plan`.
    """

    name = "train"

    def __init__(
        self,
        cfg: TrainConfig,
        explicit: tp.Collection[str] = (),
        table: tp.Mapping[str, tp.Any] | None = None,
    ):
        self.cfg, self._explicit, self._table = cfg, explicit, table

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The SAEs, grouped by the batches that they share. Raises as :func:`plan` does."""
        curves.check_wandb(self.cfg.wandb_project)
        return groups(self.cfg, self._explicit, self._table)

    @property
    def _members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]

    @functools.cached_property
    def _team(self) -> Team | None:
        """The ranks that torchrun or a similar launcher started; None if it started none."""
        place = torchrun.place()
        if place is not None:
            return join(place, self.cfg)
        torchrun.refuse_to_be_alone()
        return None

    @property
    def ranks(self) -> Ranks:
        return self._team.ranks if self._team else ALONE

    @property
    def configs(self) -> dict[str, TrainConfig]:
        return {member.url: member.config for member in self._members}

    @property
    def key(self) -> str:
        return digest([member.run_id for member in self._members])

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of the runs, in the order of the sweep."""
        return tuple(member.url for member in self._members)

    def published(self) -> bool:
        return not unpublished(self._members)

    def there(self) -> list[str]:
        missing = {member.url for member in unpublished(self._members)}
        return [url for url in self.urls if url not in missing]

    def result(self) -> Result:
        return Result(self.urls)

    def items(self) -> list[Item]:
        """One per group, which costs as much as it has SAEs."""
        items = []
        for number, group in enumerate(self.groups, start=1):
            runs = [member.run_id for member in group.members]
            name = f"group {number} of {len(self.groups)}: {len(runs)} SAE{'s' * (len(runs) != 1)}"
            items.append(Item(name, len(runs), {"group": group.group_id, "runs": runs}))
        return items

    def _group(self, item: Item) -> Group:
        """The group of an item, found by its runs: groups may change once training has begun.

        Raises:
            ConfigError: the item is of another config.
        """
        known = {member.run_id: member for member in self._members}
        name, runs = item.spec["group"], item.spec["runs"]
        if not known.keys() >= set(runs):
            raise ConfigError(
                f"There is no group {name}: the config or the version of saev changed since it was "
                "planned. Submit the dataset again."
            )
        return Group(name, tuple(known[run_id] for run_id in runs))

    def done(self, item: Item) -> bool:
        return not unpublished(self._group(item).members)

    def outlook(self, todo: Sequence[Item]) -> list[str]:
        return list(outlook.of([self._group(item) for item in todo]))

    def begin(self, todo: Sequence[Item]) -> None:
        storage.check_writable(self.cfg.runs_root)
        storage.clean_temporary(self.cfg.runs_root)  # of a process that was killed

    def work(self, item: Item, context: Context) -> None:
        group = self._group(item)
        config = group.members[0].config
        if self._team is None and (n := n_ranks(config)) > 1:
            launch.train(group.to_item(), n, context.progress)
        else:
            train_group(group, self._team or alone(config), context.progress)

    def publish(self, progress: Progress) -> None:
        members = self._members
        missing = [m.url for m in unpublished(members)]
        if missing:
            raise IncompleteError(
                f"{len(missing)} of {len(members)} runs have no {RUN}: {', '.join(missing[:3])}"
                f"{', …' if len(missing) > 3 else ''}. Run the same `saev train` command again."
            )

    def tidy(self, items: Sequence[Item]) -> None:
        """Delete what killed workers left of the resume points of finished groups."""
        place = storage.join(self.cfg.runs_root, resume.FOLDER)
        left = {entry.name for entry in storage.list_dir(place, missing_ok=True)}
        for item in items:
            if item.spec["group"] in left and self.done(item):
                _clear(self._group(item))


def train_group(group: Group, team: Team, progress: Progress) -> None:
    """Train a group as one of its ranks. Returns when all ranks have finished."""
    ranks = team.ranks
    points = resume.Points(_resume_folder(group))
    # Only rank 0 looks at the storage, and tells the others: it may change between two looks.
    members, point = _pending(group, points) if ranks.first else ((), None)
    told = ranks.tell(
        {"run_ids": [m.run_id for m in members], "point": point and [point.step, point.meta]}
    )
    if not ranks.first:
        members = tuple(m for m in group.members if m.run_id in told["run_ids"])
        point = told["point"] and resume.ResumePoint(told["point"][0], {}, told["point"][1])
    if members:
        with Trainer(members, points, team, point) as trainer:
            trainer.train(progress)
            trainer.finish(progress)
    if ranks.first:
        _clear(group)
    ranks.tell(None)  # no rank returns before everything is published


def _resume_folder(group: Group) -> str:
    return resume.folder(group.members[0].config.runs_root, group.group_id)


def _clear(group: Group) -> None:
    """Delete the resume points of a group that is published."""
    resume.clear(_resume_folder(group))


def _pending(
    group: Group, points: resume.Points
) -> tuple[tuple[Member, ...], resume.ResumePoint | None]:
    """Members to train, and the resume point to continue from."""
    pending = tuple(unpublished(group.members))
    if len(pending) < len(group.members):
        logger.info(
            "%d of %d runs are done.", len(group.members) - len(pending), len(group.members)
        )
    point = points.load([m.url for m in pending]) if pending else None
    if point is not None:
        # If the group was killed while it published, the point has published members too.
        trained = set(point.meta["run_ids"])
        pending = tuple(m for m in group.members if m.run_id in trained)
    return pending, point
