"""What is trained: SAEs, each with the name of its run folder, and groups of them."""

import typing as tp

from saev import storage
from saev.config import TrainConfig

RUN = "run.json"
"""The object of a run folder that is written last."""
RULES = 2
"""Counts changes of how a command becomes configs: how seeds of a sweep are made, what evaluation
takes over from training, how long a warm-up is. A run.json without it is of version 0.1.0, rules 1.
"""
RUN_ID_DIGITS = 12


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
        """Whether it is trained and complete."""
        return storage.exists(storage.join(self.url, RUN))

    def record(self) -> dict[str, tp.Any]:
        """What its run.json says; empty if the run is not published, or run.json is no object."""
        if not self.published:
            return {}
        record = storage.read_json(storage.join(self.url, RUN))
        return record if isinstance(record, dict) else {}

    @property
    def is_complete(self) -> bool:
        """Whether it is published, with a run.json that names this run.

        Raises:
            CorruptDataError: run.json is no JSON.
        """
        return self.record().get("run_id") == self.run_id


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
        """A group that is named by its members."""
        return cls(digest([m.run_id for m in members]), tuple(members))
