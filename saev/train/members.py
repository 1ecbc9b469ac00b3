"""What is trained: SAEs, each with the name of its run folder, and groups of them."""

import concurrent.futures
import typing as tp

from saev import storage
from saev.config import TrainConfig
from saev.config.train import RUN
from saev.errors import CorruptDataError

RULES = 2
"""Version of the rules that turn a command into resolved configs: how seeds of a sweep are made,
which settings evaluation takes from training, how long a warm-up is. A run.json without this number
was written by version 0.1.0, with rules 1."""
RUN_ID_DIGITS = 12
REMEDY = "Restore the run folder from a copy, or delete it and run the same command again."
"""What to do about damage."""
_N_READERS = 16


def digest(obj: tp.Any) -> str:
    """Name of a run or a group."""
    return storage.content_hash(obj, RUN_ID_DIGITS)


class Member(tp.NamedTuple):
    """One SAE of a sweep."""

    run_id: str
    """Name of the run folder."""
    config: TrainConfig
    """Fully resolved."""
    rules: int = RULES
    """Number of the rules by which its config was resolved."""

    @property
    def url(self) -> str:
        """The run folder."""
        return storage.join(self.config.runs_root, self.run_id)

    @property
    def published(self) -> bool:
        """Whether it is trained and complete. Raises as :meth:`record` does."""
        return bool(self.record())

    def record(self) -> dict[str, tp.Any]:
        """What its run.json says; empty if the run is not published.

        Raises:
            CorruptDataError: run.json is damaged or of another run. The SAE is not trained again,
                because its weights may be intact.
        """
        place = storage.join(self.url, RUN)
        found = storage.find_sealed(place, remedy=REMEDY)
        if found is None:
            return {}
        if found.record.get("run_id") != self.run_id:
            raise CorruptDataError(
                f"{place} is of run {found.record.get('run_id')!r:.60}, expected {self.run_id}. "
                f"{REMEDY}"
            )
        return found.record


def unpublished(members: tp.Sequence[Member]) -> list[Member]:
    """The members that are not published. Lists each root once, then reads the run.json of runs.

    Raises:
        CorruptDataError: a run.json is damaged or of another run.
    """
    there = {
        (root, entry.name)
        for root in {member.config.runs_root for member in members}
        for entry in storage.list_dir(root, missing_ok=True)
    }

    def is_missing(member: Member) -> bool:
        return (member.config.runs_root, member.run_id) not in there or not member.published

    with concurrent.futures.ThreadPoolExecutor(_N_READERS, "saev-runs") as pool:
        missing = list(pool.map(is_missing, members))
    return [member for member, is_so in zip(members, missing, strict=True) if is_so]


class Group(tp.NamedTuple):
    """SAEs that are trained on the same batches: one work item."""

    group_id: str
    members: tuple[Member, ...]

    def to_item(self) -> dict[str, tp.Any]:
        """As plain JSON."""
        members = [
            {"run_id": m.run_id, "config": m.config.to_dict(), "rules": m.rules}
            for m in self.members
        ]
        return {"group": self.group_id, "members": members}

    @classmethod
    def from_item(cls, item: tp.Mapping[str, tp.Any]) -> "Group":
        """The inverse of :meth:`to_item`."""
        members = (
            Member(
                m["run_id"],
                TrainConfig.from_dict(m["config"], source="work item"),
                m.get("rules", 1),
            )
            for m in item["members"]
        )
        return cls(item["group"], tuple(members))

    @classmethod
    def of(cls, members: tp.Sequence[Member]) -> "Group":
        """A group whose name is a hash of its members' names."""
        return cls(digest([m.run_id for m in members]), tuple(members))
