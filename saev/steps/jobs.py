"""The work of a pipeline run on one dataset, and its division into slots, one for each pod.

<root>/datasets/configs/<hash>.json           a config as it was submitted
<root>/jobs/<hash>/
    job.json        dataset, run and config; steps pass on only the URL of this folder
    plan.json       the items to record
    publish.json    the items to train, to measure and to draw

Kubernetes keeps a pipeline run in one object of at most 1 MiB, and repeats every input of every pod
in it twelve times. So inputs are short, and the number of pods does not grow with the work: a pod
gets the number of a slot, looks up the slot's items here, and does them one after the other.
"""

import heapq
import logging
import math
import typing as tp

from saev import storage
from saev.config.run import RunFile
from saev.config.stages import Stages, images_of, resolve_stages
from saev.errors import ConfigError, SaevError
from saev.progress import Progress
from saev.steps import discover, last_word
from saev.steps.discover import Dataset

logger = logging.getLogger(__name__)

Item = dict[str, tp.Any]
_T = tp.TypeVar("_T")

_RESTORE = "Restore it from a copy, or submit the dataset again."
_FOLDER = "jobs"
_DIGITS = 16
_SHORT = 12
"""Digits of a job's name. They are few, because a root has few jobs."""
_UNEVEN = 1.1
"""Most time of the longest slot of measuring, relative to the average."""


class Job(tp.NamedTuple):
    """The work on one dataset in one state, for one pipeline run."""

    url: str
    """URL of its folder."""
    root: str
    """URL of the storage root."""
    owner: str
    """Id of the pipeline run; "" means that the job has no claim."""
    dataset: Dataset
    config: str
    """URL of the config."""

    def stages(self) -> Stages:
        """The stages' configs. Raises ConfigError that names a wrong key."""
        raw = storage.read_sealed(self.config, remedy=_RESTORE).record["config"]
        file = RunFile.from_dict(raw, source=self.config)
        images = images_of(file, self.dataset.url, self.dataset.version)
        return resolve_stages(file, self.root, images, self.config)

    def shards(self, plan: "Plan") -> str:
        """URL of the shards folder of a plan."""
        return storage.join(self.root, "shards", plan.shards)

    def run(self, name: str) -> str:
        """URL of a run folder."""
        return storage.join(self.root, "runs", name)


class Plan(tp.NamedTuple):
    """The result of a planning step."""

    shards: str
    """Name of the shards folder."""
    runs: list[str]
    """Names of all runs, in the order of the sweep; empty before they are planned."""
    slots: dict[str, list[list[Item]]]
    """The items of each slot, by the step that does them."""
    keys: dict[str, str] = {}  # noqa: RUF012 - a default that is never changed
    """Keys of the stages' jobs, by the name of the stage. A key that depends on an SAE that is not
    trained yet is missing."""


def make(root: str, owner: str, raw_config: tp.Any, dataset: Dataset) -> str:
    """Write a job to storage. Returns its URL. Equal arguments write the same job."""
    base = storage.normalize(root)
    digest = storage.content_hash(raw_config, _DIGITS)
    config = storage.join(base, discover.FOLDER, "configs", f"{digest}.json")
    if not storage.exists(config):
        storage.write_json(config, storage.seal({"config": raw_config}))
    record = {"owner": owner, "dataset": dataset._asdict(), "config": digest}
    url = storage.join(base, _FOLDER, storage.content_hash(record, _SHORT))
    storage.write_json(storage.join(url, "job.json"), storage.seal(record))
    return url


def read(url: str) -> Job:
    """Read a job from storage.

    Raises:
        ConfigError: the URL is not that of a job.
        StorageError: the job cannot be read.
    """
    url = storage.normalize(url)
    root, _, folder = storage.parent(url).rpartition("/")
    if folder != _FOLDER:
        raise ConfigError(
            f"--job is {url!r}; expected the URL of a job, as `saev step discover` gives it."
        )
    record = storage.read_sealed(storage.join(url, "job.json"), remedy=_RESTORE).record
    try:
        owner, digest = record["owner"], record["config"]
        dataset = Dataset.from_dict(record["dataset"])
    except KeyError as err:
        raise ConfigError(f"{url} has no {err}, so it is no job of `saev step discover`.") from err
    if not storage.is_file_name(str(digest)):
        raise ConfigError(f"{url} names the config {digest!r}; expected a name without slashes.")
    config = storage.join(root or "/", discover.FOLDER, "configs", f"{digest}.json")
    return Job(url, root or "/", str(owner), dataset, config)


# --- Plans ----------------------------------------------------------------------------------------


def write_plan(job: Job, step: str, plan: Plan) -> None:
    """Write the result of a planning step, for the steps after it."""
    storage.write_json(_place(job, step), storage.seal(plan._asdict()))


def read_plan(job: Job, step: str) -> Plan:
    """Read the result of a planning step. Raises StorageError if it is missing."""
    record = storage.read_sealed(_place(job, step), remedy=_RESTORE).record
    return Plan(**{field: record[field] for field in Plan._fields if field in record})


def _place(job: Job, step: str) -> str:
    return storage.join(job.url, f"{step}.json")


def numbered(slots: tp.Sequence[tp.Sequence[Item]]) -> list[str]:
    """The inputs of a loop: each slot's number and a name for people, such as `0: part 1 of 8`."""
    found = []
    for i, items in enumerate(slots):
        more = f" and {len(items) - 1} more" if len(items) > 1 else ""
        found.append(f"{i}: {items[0]['name']}{more}")
    return found


def items_of(plan: Plan, step: str, slot: str) -> list[Item]:
    """The items of a slot.

    Args:
        plan: the plan.
        step: the step that does the slot.
        slot: one of the texts of :func:`numbered`, or only the number.

    Raises:
        ConfigError: there is no such slot.
    """
    slots, number = plan.slots.get(step, []), slot.partition(":")[0]
    if not number.isascii() or not number.isdecimal() or int(number) >= len(slots):
        raise ConfigError(
            f"--slot is {slot!r}; expected a number from 0 to {len(slots) - 1}: "
            f"{len(slots)} slots are planned."
        )
    return slots[int(number)]


# --- Slots ----------------------------------------------------------------------------------------


def cut(items: tp.Sequence[_T], n: int, costs: tp.Sequence[float] | None = None) -> list[list[_T]]:
    """Divide items into at most n slots of about equal cost. Equal arguments give equal slots.

    Items are assigned in order of falling cost, each to the slot that costs least so far. By
    Graham's rule, the longest slot takes at most 4/3 of the time of the best division.

    Args:
        items: the items, in any order.
        n: most slots.
        costs: the cost of each item; by default all items cost the same.
    """
    costs = costs or [1.0] * len(items)
    slots: list[list[int]] = [[] for _ in range(min(n, len(items)))]
    loads = [(0.0, i) for i in range(len(slots))]
    for k in sorted(range(len(items)), key=lambda k: (-costs[k], k)):
        load, i = heapq.heappop(loads)
        slots[i].append(k)
        heapq.heappush(loads, (load + costs[k], i))
    return [[items[k] for k in sorted(slot)] for slot in slots]


def n_pieces(costs: tp.Sequence[float], n_slots: int, most: tp.Sequence[int]) -> list[int]:
    """The number of pieces of each pass, so that slots of whole pieces are about equal.

    Fewer pieces are better, because each piece opens SAEs and their activations.

    Args:
        costs: the cost of each pass over the activations, such as the number of its SAEs.
        n_slots: number of slots.
        most: the largest number of pieces that each pass can be divided into.
    """
    found: list[int] = []
    for of_largest in range(1, n_slots + 1):
        found = [
            min(math.ceil(of_largest * cost / max(costs)), n)
            for cost, n in zip(costs, most, strict=True)
        ]
        pieces = [cost / n for cost, n in zip(costs, found, strict=True) for _ in range(n)]
        longest = max(map(sum, cut(pieces, n_slots, pieces)), default=0.0)
        if longest * n_slots <= _UNEVEN * sum(costs):
            break
    return found


def each(
    items: tp.Sequence[Item], work: tp.Callable[[Item], list[str]], progress: Progress
) -> list[str]:
    """Do items one after the other.

    An item that fails permanently does not stop the other items of its slot.

    Returns:
        URLs of all results.

    Raises:
        SaevError: an item failed. A passing failure is raised at once, the first permanent failure
            after the other items.
    """
    made: list[str] = []
    failures: list[SaevError] = []
    for number, item in enumerate(items, start=1):
        progress.safe_point()
        logger.info("%s", item["name"])
        progress.item(item["name"], number, len(items))
        try:
            made += work(item)
        except SaevError as err:
            progress.safe_point()  # if the claim is lost, the other items are not ours either
            if last_word.of(err).kind != "permanent":
                raise
            failures.append(err)
            if item is not items[-1]:
                logger.error("%s failed, and the other items go on: %s", item["name"], err)
    if failures:
        raise failures[0]
    return made
