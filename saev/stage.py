"""The interface of a stage. :mod:`saev.driver` runs stages, and :mod:`saev.chain` lists them.

A stage makes a result from a config and from the results of earlier stages. Its work is a list of
items. Any process can do an item, and a killed process is simply run again. The result is published
by one small object, which is written last.
"""

import abc
import re
import types
import typing as tp
from collections.abc import Callable, Mapping, Sequence

from saev.config.stages import Stages
from saev.config.train import TrainConfig
from saev.errors import ConfigError, SaevError
from saev.progress import Progress, Task

_T = tp.TypeVar("_T")


class Item(tp.NamedTuple):
    """A piece of work."""

    name: str
    """Name in messages."""
    cost: float
    """Amount of work, in the job's unit."""
    spec: dict[str, tp.Any]
    """Identifies the item, as plain JSON: a few numbers and ids, no configs."""


class Share(tp.NamedTuple):
    """The work of one job for several runs of training."""

    runs: tuple[int, ...]
    """Numbers of the runs."""
    pieces: int = 1
    """Number of pods among which the items of the job can usefully be divided."""


class Result(tp.NamedTuple):
    """The published result of a stage."""

    urls: tuple[str, ...]
    """URLs of its folders."""
    figures: Mapping[str, str | float] = types.MappingProxyType({})
    """Metrics for Kubeflow's UI."""
    page: Callable[[int], str] | None = None
    """Makes a self-contained HTML page. The argument is its approximate most bytes."""


class Context(tp.NamedTuple):
    """Arguments of :meth:`Job.work` that are the same for all items."""

    progress: Progress
    """Shows progress, and raises at points where the work has to stop."""
    bar: Task
    """The progress bar of all items. A job without threads advances it while it does an item."""


class DoneMeanwhileError(Exception):
    """Another worker has done the item meanwhile, so this one must not write it."""


class Ranks(tp.Protocol):
    """The processes that work on each item together."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and decides."""

    def tell(self, obj: tp.Any) -> tp.Any:
        """The plain JSON that the first process passes. All processes have to call this."""


class _Alone:
    first = True

    def tell(self, obj: tp.Any) -> tp.Any:
        return obj


class Job(abc.ABC):
    """A stage with its config, opened in one process.

    A job opens its model, dataset or SAEs when they are first needed, and once for all items. If
    the result is published already, it opens none of them. The caller must close the job.
    """

    name: tp.ClassVar[str]
    """Name of the stage in the chain."""
    opening: tp.ClassVar[str] = "look for the result"
    """Description of finding out whether the result is published, for the log."""
    unit: tp.ClassVar[str] = ""
    """Unit of the costs of items, such as images; empty if each item has its own progress bar."""

    @classmethod
    def shares(
        cls, stages: Stages, found: Mapping[str, str], runs: Sequence[TrainConfig], n_slots: int
    ) -> "list[Share]":
        """Divides the work for runs of training, which need not be trained yet, among jobs.

        Args:
            stages: the configs of all stages.
            found: URLs of the results of all runs that it reads, by stage name.
            runs: the runs' configs.
            n_slots: number of pods.
        """
        del stages, found, n_slots
        return [Share((number,)) for number in range(len(runs))]

    @property
    def title(self) -> str:
        """What the bar of all items is called."""
        return self.name

    @property
    def threads(self) -> int:
        """Number of items done at the same time; one by default."""
        return 1

    @property
    def ranks(self) -> Ranks:
        """The processes that work on each item together; this one alone by default."""
        return _Alone()

    @property
    def configs(self) -> Mapping[str, TrainConfig]:
        """The configs of runs of training that it makes, by the URL of the run."""
        return {}

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Hash of everything that the result depends on. Other inputs have another key."""

    @property
    @abc.abstractmethod
    def urls(self) -> tuple[str, ...]:
        """URLs of the result, which may not exist yet."""

    @abc.abstractmethod
    def published(self) -> bool:
        """Whether the result is complete. Looks at storage.

        Raises:
            CorruptDataError: it is complete, but damaged.
        """

    def there(self) -> Sequence[str]:
        """The URLs whose results are complete."""
        return self.urls if self.published() else ()

    @abc.abstractmethod
    def result(self) -> Result:
        """The published result."""

    def results(self) -> Sequence[Result]:
        """The published result of each of the configs that the job was opened for."""
        return [self.result()]

    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """All items, including done ones. Equal inputs give equal items in equal order."""

    @abc.abstractmethod
    def done(self, item: Item) -> bool:
        """Whether an item is done. Looks at storage; may be called by several threads."""

    def outlook(self, todo: Sequence[Item]) -> Sequence[str]:
        """What is going to be done, in lines for people."""
        n = round(sum(item.cost for item in todo))
        return [f"{self.name}: {n:,} {self.unit} to do."] if self.unit else []

    def begin(self, todo: Sequence[Item]) -> None:  # noqa: B027 - most jobs have nothing to do
        """Prepare for these items. Raises an error at once if nothing can be written."""

    @abc.abstractmethod
    def work(self, item: Item, context: Context) -> None:
        """Do an item. Writes only objects of this item, so a second call is harmless."""

    @abc.abstractmethod
    def publish(self, progress: Progress) -> None:
        """Check that all items are done, and publish the result.

        Raises:
            IncompleteError: an item is not done.
        """

    def tidy(self, items: Sequence[Item]) -> None:  # noqa: B027 - nothing may be left
        """Delete objects of these items that are no longer needed, such as those of killed
        workers."""

    def failure(self) -> SaevError | None:
        """The error of the results that failed alone, while the job went on with the others. It is
        to be raised when these are done."""
        return None

    def close(self) -> None:  # noqa: B027 - most jobs have nothing to close
        """Free memory and open files."""


class Part(tp.NamedTuple):
    """One of several equal slices of the items."""

    number: int
    """Number of the slice, from 1."""
    of: int
    """Number of slices."""

    @classmethod
    def parse(cls, text: str) -> tp.Self:
        """Parse ``I/N``. An empty text means all items.

        Raises:
            ConfigError: not 1 ≤ I ≤ N.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text or "1/1")
        number, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= of:
            raise ConfigError(
                f"--part is {text!r}, expected I/N with I from 1 to N, such as 1/4 to 4/4."
            )
        return cls(number, of)

    def slice(self, items: Sequence[_T]) -> Sequence[_T]:
        """The items of this part, including done ones. It may be empty if there are many parts."""
        n = len(items)
        return items[n * (self.number - 1) // self.of : n * self.number // self.of]
