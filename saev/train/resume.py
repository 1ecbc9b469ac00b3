"""Resume points: the whole state of a group of runs at one step.

    <runs_root>/resume/<group>/
        step-000000001000.safetensors    weights, moments, counters
        step-000000001000.curves.jsonl   the curves of every run up to that step
        step-000000001000.json           sizes and checksums of both; written last
        generation-2.json                why training began anew, if all points were damaged
        generation-2/step-…              the points since then
        set-aside-1/<run_id>/…           the curves until then

A point is used only if all its checksums are right. It is passed over only if damage is proven.
After any other error it is read again, for some minutes. The folder is deleted when the group's
runs are published. Points of version 0.1.0 have no curves; these are read from the run folders.
"""

import logging
import re
import typing as tp
from collections.abc import Callable
from time import monotonic, sleep

from saev import storage
from saev.errors import CorruptDataError, StorageError
from saev.limits import N_RESUME_POINTS
from saev.train import point as points
from saev.train.point import ResumePoint

logger = logging.getLogger(__name__)

FOLDER = "resume"
"""Below the runs' root."""
_T = tp.TypeVar("_T")


class Patience(tp.NamedTuple):
    """How long to retry while the storage fails."""

    total_s: float = 600.0
    """Seconds in all."""
    pause_s: float = 30.0
    """Seconds between two tries, each of which is logged."""


PATIENCE = Patience()
_GENERATION = re.compile(r"generation-(\d+)\.json")


def folder(runs_root: str, group: str) -> str:
    """Where the resume points of a group are."""
    return storage.join(runs_root, FOLDER, group)


def patiently(read: Callable[[], _T], url: str, patience: Patience | None = None) -> _T:
    """Call ``read`` until it succeeds, and return its result. Retries while the storage fails.

    The time before the first failure does not count: a large resume point may take long to read.

    Args:
        read: reads something.
        url: what it is, for the log.
        patience: how long after the first failure; by default PATIENCE.

    Raises:
        CorruptDataError: as soon as ``read`` raises it, because retries do not repair damage.
        StorageError: what ``read`` raised last.
    """
    total_s, pause_s = patience or PATIENCE
    start: float | None = None
    while True:
        try:
            return read()
        except CorruptDataError:
            raise
        except StorageError as err:
            start = monotonic() if start is None else start
            left = total_s - (monotonic() - start)
            if left <= 0:
                raise StorageError(
                    f"{err} It was tried for {total_s / 60:g} minutes. Nothing is lost: the same "
                    "command continues from the last resume point once it can be read."
                ) from err
            logger.warning("Waiting for %s, up to %.1f minutes more: %s", url, left / 60, err)
        sleep(min(pause_s, max(left, 0.0)))


class Points:
    """The resume points of a group.

    Args:
        url: their folder.
        patience: how long to wait for a storage that fails; by default PATIENCE.
    """

    def __init__(self, url: str, patience: Patience | None = None):
        self.url = url
        self.generation = 1
        """How often training began from the start."""
        self.set_aside: list[dict[str, tp.Any]] = []
        """The damaged points of earlier generations, and where their curves are, as plain JSON."""
        self._patience = patience
        self._known: set[str] | None = None
        """Points that existed when training began, and those of this worker. None before that."""

    @property
    def _place(self) -> str:
        """Folder of the points of this generation."""
        return _place(self.url, self.generation)

    def load(self, run_urls: tp.Sequence[str] = ()) -> ResumePoint | None:
        """The newest intact point; None if training is to begin from the start.

        Damaged points are passed over with a warning. If none is intact, they stay where they are,
        the runs' curves are copied beside them, and a new generation begins.

        Args:
            run_urls: run folders of the group.

        Raises:
            StorageError: something could not be read for a long time; nothing was changed.
        """

        def read() -> tuple[ResumePoint | None, list[dict[str, tp.Any]]]:
            self._find_generation()
            return _newest(self._place)

        point, damaged = patiently(read, self.url, self._patience)
        if point is None and damaged:
            self._begin_anew(damaged, run_urls)
        entries = storage.list_dir(self._place, missing_ok=True)
        self._known = {points.stem_of(e.name) for e in entries if points.is_pointer(e.name)}
        return point

    def save(self, point: ResumePoint) -> None:
        """Publish a point, and delete all but this one and the one before it.

        Raises:
            StorageError: another worker trains the same group; nothing was written.
        """
        stem = points.stem(point.step)
        storage.clean_temporary(self._place)
        # Only objects of this listing are deleted below, never those that are written after it.
        before = [e for e in storage.list_dir(self._place, missing_ok=True) if not e.is_dir]
        self._check_alone(before)
        if self._known is not None:
            self._known.add(stem)
        for entry in before:
            if entry.name == f"{stem}.json":  # an old pointer must not stand beside new tensors
                storage.delete(entry.url)
        points.write(self._place, point)
        try:
            _delete_older(before, stem)
        except StorageError as err:  # the next point deletes them
            logger.warning("Older resume points stay for now: %s", err)

    def _check_alone(self, entries: tp.Sequence[storage.Entry]) -> None:
        stems = {points.stem_of(e.name) for e in entries if points.is_pointer(e.name)}
        others = stems - self._known if self._known is not None else set()
        if others:
            raise StorageError(
                f"Another worker trains the same SAEs: it wrote {max(others)} to {self._place} "
                "after this one began. This one stops, and leaves that resume point as it is. When "
                "no worker is left, run the same command again; it continues from there."
            )

    def history(self) -> dict[str, tp.Any]:
        """What run.json says of the generations."""
        told: dict[str, tp.Any] = {"generation": self.generation}
        if self.generation > 1:
            told["set_aside"] = self.set_aside
        return told

    def _find_generation(self) -> None:
        names = [e.name for e in storage.list_dir(self.url, missing_ok=True) if not e.is_dir]
        numbers = [int(found[1]) for found in map(_GENERATION.fullmatch, names) if found]
        self.generation = max(numbers, default=1)
        self.set_aside = []
        if numbers:
            place = storage.join(self.url, f"generation-{self.generation}.json")
            try:
                self.set_aside = list(storage.read_sealed(place).record["set_aside"])
            except (CorruptDataError, KeyError, TypeError) as err:  # its name is enough
                logger.warning("%s", err)

    def _begin_anew(self, damaged: list[dict[str, tp.Any]], run_urls: tp.Sequence[str]) -> None:
        number, kept = self.generation, f"set-aside-{self.generation}"

        def copy() -> None:
            for run_url in run_urls:
                for entry in storage.list_dir(run_url, missing_ok=True):
                    if entry.name.endswith(".jsonl"):
                        place = storage.join(self.url, kept, storage.name(run_url), entry.name)
                        storage.write_bytes(place, storage.read_bytes(entry.url))

        patiently(copy, self.url, self._patience)
        self.set_aside.append({"generation": number, "points": damaged, "curves": kept})
        record = {"generation": number + 1, "set_aside": self.set_aside}
        place = storage.join(self.url, f"generation-{number + 1}.json")
        storage.write_json(place, storage.seal(record))
        logger.warning(
            "All resume points in %s are damaged. They are set aside with their curves (%s), and "
            "training begins from the start.",
            *(self._place, storage.join(self.url, kept)),
        )
        self.generation = number + 1


def _delete_older(before: tp.Sequence[storage.Entry], newest: str) -> None:
    """Delete what was listed before the newest point was written, except the point before it."""
    others = [e for e in before if e.name.startswith("step-") and points.stem_of(e.name) != newest]
    lower = {points.stem_of(e.name) for e in others if points.is_pointer(e.name)}
    kept = sorted(stem for stem in lower if stem < newest)[1 - N_RESUME_POINTS :]
    # Pointers go first: a pointer without tensors would look like damage.
    for entry in sorted(others, key=lambda e: not points.is_pointer(e.name)):
        if points.stem_of(entry.name) not in kept:
            storage.delete(entry.url)


def clear(url: str) -> None:
    """Delete the resume points of a finished group, and the folder of all groups if it is empty."""
    storage.clean_up(url, recursive=True)
    storage.remove_empty(storage.parent(url))


class Flight(tp.NamedTuple):
    """The runs of a group whose training has begun and is not finished."""

    run_ids: tuple[str, ...]
    rules: int


def flight(url: str) -> Flight:
    """The runs of the newest point in a group's folder; none if no pointer is intact.

    Raises:
        StorageError: a pointer cannot be read.
    """
    group = Points(url)
    group._find_generation()
    for generation in range(group.generation, 0, -1):
        place = _place(url, generation)
        for pointer in _pointers(storage.list_dir(place, missing_ok=True)):
            try:
                meta = points.read_pointer(pointer).meta
            except CorruptDataError:
                continue
            return Flight(tuple(map(str, meta["run_ids"])), int(meta.get("rules", 1)))
    return Flight((), 1)


def _place(url: str, generation: int) -> str:
    return url if generation == 1 else storage.join(url, f"generation-{generation}")


def _pointers(entries: tp.Iterable[storage.Entry]) -> list[str]:
    """URLs of the pointers, newest first."""
    names = [e for e in entries if not e.is_dir and points.is_pointer(e.name)]
    return [e.url for e in sorted(names, key=lambda e: e.name, reverse=True)]


def _newest(place: str) -> tuple[ResumePoint | None, list[dict[str, tp.Any]]]:
    """The newest intact point of a folder, and the damaged ones before it, with the reasons."""
    damaged: list[dict[str, tp.Any]] = []
    for url in _pointers(storage.list_dir(place, missing_ok=True)):
        try:
            return points.read(url), damaged
        except CorruptDataError as err:
            logger.warning("Resume point passed over: %s", err)
            damaged.append({"point": points.stem_of(storage.name(url)), "reason": str(err)})
    return None, damaged
