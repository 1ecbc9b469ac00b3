"""Finds runs and groups below a runs' root whose names differ from those they would get now.

Version 0.1.0 made the seed of an SAE from its place in the sweep, so its run ids are different. A
group whose training has begun keeps its name when SAEs are added to its sweep. This module looks
for complete runs and for groups with resume points. They keep their names. All other SAEs are
grouped anew.
"""

import functools
import logging
import typing as tp

from saev import storage
from saev.train import resume
from saev.train.members import Group, Member

logger = logging.getLogger(__name__)


class Wanted(tp.NamedTuple):
    """An SAE that is asked for."""

    member: Member
    """The SAE under the name that it has now."""
    older: list[Member]
    """The SAE under the names that it had in version 0.1.0."""


def choose(by_data: tp.Sequence[tp.Sequence[Wanted]], max_parallel: int) -> list[Group]:
    """Group SAEs for training. SAEs and groups that exist already keep their names.

    Args:
        by_data: lists of SAEs that can share batches.
        max_parallel: most SAEs in a group; 0 for all.

    Raises:
        StorageError: the runs' root cannot be read.
    """
    roots: dict[str, _Root] = {}
    found: list[Group] = []
    for wanted in by_data:
        url = wanted[0].member.config.runs_root
        root = roots.setdefault(url, _Root(url))
        found += _choose(wanted, root, max_parallel)
    return found


def _choose(wanted: tp.Sequence[Wanted], root: "_Root", max_parallel: int) -> list[Group]:
    members = [_published_before(one, root) or one.member for one in wanted]
    plain = _grouped(members, max_parallel)
    known = {group.group_id for group in plain}
    places = {m.run_id: (i, m) for i, one in enumerate(wanted) for m in (one.member, *one.older)}
    kept = [group for group in plain if group.group_id in root.groups]
    going = {member.run_id for group in kept for member in group.members}
    free = {i for i, member in enumerate(members) if member.run_id not in going}
    order: list[tuple[int, Group]] = []
    for name in sorted(root.groups - known) if free else ():
        flight = root.in_flight(name)
        own = [places[run_id] for run_id in flight.run_ids if run_id in places]
        indices = {i for i, _ in own}
        if len(own) < len(flight.run_ids) or any(m.rules < flight.rules for _, m in own):
            continue
        if own and indices <= free:
            free -= indices
            order.append((min(indices), Group(name, tuple(member for _, member in own))))
    if not order:
        return plain
    number = {member.run_id: i for i, member in enumerate(members)}
    rest = _grouped([members[i] for i in sorted(free)], max_parallel)
    order += [(number[group.members[0].run_id], group) for group in (*kept, *rest)]
    return [group for _, group in sorted(order, key=lambda pair: pair[0])]


def _grouped(members: tp.Sequence[Member], max_parallel: int) -> list[Group]:
    size = max_parallel or max(1, len(members))
    return [Group.of(members[start : start + size]) for start in range(0, len(members), size)]


def _published_before(one: Wanted, root: "_Root") -> Member | None:
    """The SAE of version 0.1.0, if it is complete."""
    return next((m for m in one.older if root.is_complete(m)), None)


class _Root:
    """The runs and the resume points below a runs' root. Each folder is listed at most once."""

    def __init__(self, url: str):
        self._url = url
        self._flights: dict[str, resume.Flight] = {}

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return _folders(self._url)

    @functools.cached_property
    def groups(self) -> frozenset[str]:
        """Names of groups that have resume points."""
        url = storage.join(self._url, resume.FOLDER)
        return _folders(url) if resume.FOLDER in self._names else frozenset()

    def is_complete(self, member: Member) -> bool:
        """Whether the run of a member is published, and was resolved by the same rules."""
        if member.run_id not in self._names:
            return False
        record = member.record()
        return bool(record) and record.get("rules", 1) == member.rules

    def in_flight(self, group: str) -> resume.Flight:
        """The runs of a group's newest resume point; no runs if no point is intact.

        While the storage fails, this waits, as training itself does. If it skipped the point, the
        group's SAEs would be trained again from the start.

        Raises:
            StorageError: it could not be read for a long time; nothing was changed.
        """
        if group not in self._flights:
            url = storage.join(self._url, resume.FOLDER, group)
            self._flights[group] = resume.patiently(lambda: resume.flight(url), url)
        return self._flights[group]


def _folders(url: str) -> frozenset[str]:
    return frozenset(e.name for e in storage.list_dir(url, missing_ok=True) if e.is_dir)
