"""plan → work → finish."""

import logging
import typing as tp

from saev import storage, torchrun
from saev.config import TrainConfig
from saev.errors import CheckpointError, IncompleteError, RankError, StorageError
from saev.progress import Progress
from saev.train import curves, launch, resume
from saev.train.members import RUN, Group, Member, unpublished
from saev.train.resolve import groups
from saev.train.team import Team, alone, join, n_ranks
from saev.train.trainer import Trainer
from saev.workers import unless_done

logger = logging.getLogger(__name__)


def plan(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[dict[str, tp.Any]]:
    """One work item per group of SAEs that share their batches; plain JSON.

    Reads the sweep file, the shards' metadata, and which runs and resume points of earlier versions
    and sweeps there are: those keep their names. Otherwise equal inputs give equal items, whatever
    is already done.

    Args:
        cfg: what to train.
        explicit: config keys that the command line set, which a sweep does not override.
        table: the sweep, if it is not a file.

    Raises:
        ConfigError: a key, a value or a combination is wrong.
        StorageError: the shards cannot be read.
    """
    curves.check_wandb(cfg.wandb_project)
    return [group.to_item() for group in groups(cfg, explicit, table)]


def work(
    cfg: TrainConfig, item: tp.Mapping[str, tp.Any], progress: Progress | None = None
) -> list[str]:
    """Train the SAEs of one item that are not published yet; returns the URLs of all of its runs.

    Continues from the newest resume point. Each run folder is published by its run.json, written
    last; the group's resume points are deleted after that. Starts one process per GPU if there are
    several (:func:`saev.train.team.n_ranks`); if torchrun or the like started this process as one
    of several, it takes its part and all of them return the same.

    Raises:
        ConfigError: the loss is not finite any more; the message names the run, step and remedy. Or
            this is one of several machines, and nobody gave it a rank.
        StorageError: data cannot be read or results cannot be written.
        RankError: another rank ended.
    """
    del cfg  # an item has the resolved configs of its members
    progress = progress or Progress(quiet=True)
    group = Group.from_item(item)
    with unless_done(
        logger,
        lambda: not unpublished(group.members),
        said="Another worker has published this group meanwhile",
        errors=(StorageError, CheckpointError, RankError),
    ):
        _train(group, item, progress)
    return [m.url for m in group.members]


def _train(group: Group, item: tp.Mapping[str, tp.Any], progress: Progress) -> None:
    config, place = group.members[0].config, torchrun.place()
    if place is not None:
        train_group(group, join(place, config), progress)
        return
    torchrun.refuse_to_be_alone()
    if (n := n_ranks(config)) > 1:
        if not unpublished(group.members):
            _clear(group)
        else:
            launch.train(item, n, progress)
    else:
        train_group(group, alone(config), progress)


def train_group(group: Group, team: Team, progress: Progress) -> None:
    """:func:`work` of one rank, and its return to the others at the end."""
    ranks = team.ranks
    points = resume.Points(_resume_folder(group))
    # Rank 0 looks at the storage and tells the others, who might see it change.
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
    ranks.tell(None)  # nobody goes on before everything is there


def _resume_folder(group: Group) -> str:
    return resume.folder(group.members[0].config.runs_root, group.group_id)


def _clear(group: Group) -> None:
    """Delete the resume points of a group that is published."""
    resume.clear(_resume_folder(group))


def _pending(
    group: Group, points: resume.Points
) -> tuple[tuple[Member, ...], resume.ResumePoint | None]:
    """Members to train, and where to go on from."""
    pending = tuple(unpublished(group.members))
    if len(pending) < len(group.members):
        logger.info(
            "%d of %d runs are done.", len(group.members) - len(pending), len(group.members)
        )
    point = points.load([m.url for m in pending]) if pending else None
    if point is not None:
        # A group that was interrupted while it published goes on with the members it trained.
        trained = set(point.meta["run_ids"])
        pending = tuple(m for m in group.members if m.run_id in trained)
    return pending, point


def finish(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[str]:
    """URLs of all runs, in the sweep's order.

    Raises:
        IncompleteError: names the runs that are not published.
    """
    return _finished(plan(cfg, explicit, table))


def _finished(items: tp.Iterable[tp.Mapping[str, tp.Any]]) -> list[str]:
    """Check that all runs are there, and delete what killed workers left of their resume points."""
    planned = [Group.from_item(item) for item in items]
    members = [member for group in planned for member in group.members]
    missing = [m.url for m in unpublished(members)]
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(members)} runs have no {RUN}: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. Run the same `saev train` command again."
        )
    for group in planned:
        _clear(group)
    return [m.url for m in members]


def run(
    cfg: TrainConfig,
    progress: Progress | None = None,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[str]:
    """Train everything that ``cfg`` asks for and is not there yet; returns the run folders."""
    items = plan(cfg, explicit, table)
    storage.check_writable(cfg.runs_root)
    for item in items:
        work(cfg, item, progress)
    return _finished(items)
