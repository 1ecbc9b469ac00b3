"""What is in a runs' root already: runs and groups that go under other names than they would now.

Version 0.1.0 made the seed of an SAE from its place in the sweep, so its run ids are others. And a
group in flight keeps its name while its sweep grows. Looked for are runs that are complete and
groups that have resume points; what is found goes on under its name, the rest is grouped anew.
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
    """Under the name that it has now."""
    older: list[Member]
    """Under those that it had in version 0.1.0."""


def choose(by_data: tp.Sequence[tp.Sequence[Wanted]], max_parallel: int) -> list[Group]:
    """Group SAEs for training, under the names under which they are there already.

    Args:
        by_data: SAEs that can share batches stand together.
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
    """What lies below a runs' root, looked at once."""

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
        """Whether a run is published that was named by the same rules."""
        if member.run_id not in self._names:
            return False
        record = member.record()
        return bool(record) and record.get("rules", 1) == member.rules

    def in_flight(self, group: str) -> resume.Flight:
        """What a group's newest resume point says; of no runs if it is damaged."""
        if group not in self._flights:
            url = storage.join(self._url, resume.FOLDER, group)
            self._flights[group] = resume.flight(url)
        return self._flights[group]


def _folders(url: str) -> frozenset[str]:
    return frozenset(e.name for e in storage.list_dir(url, missing_ok=True) if e.is_dir)
