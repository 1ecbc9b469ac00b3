"""What a stage is. :mod:`saev.driver` runs every one of them, and :mod:`saev.chain` lists them.

A stage makes one result from a config and from what earlier stages published. Its work is a list of
items. An item can be done by any process, and a process that is killed at any instant is simply run
again. The result is published by one small object, which is written last.
"""

import abc
import re
import types
import typing as tp
from collections.abc import Callable, Mapping, Sequence

from saev.errors import ConfigError
from saev.progress import Progress, Task

_T = tp.TypeVar("_T")


class Item(tp.NamedTuple):
    """A piece of work."""

    name: str
    """For people."""
    cost: float
    """How much work it is, in the job's unit."""
    spec: dict[str, tp.Any]
    """What tells the item from the others, as plain JSON: a few numbers and ids, no configs."""


class Result(tp.NamedTuple):
    """What a stage has published."""

    urls: tuple[str, ...]
    """Where it is."""
    figures: Mapping[str, str | float] = types.MappingProxyType({})
    """What Kubeflow's UI shows of it."""
    page: Callable[[int], str] | None = None
    """Makes an HTML page of at most about so many bytes, which needs no other file."""


class Context(tp.NamedTuple):
    """What an item is done with."""

    progress: Progress
    """Tells where the work has to stop, and shows what takes long."""
    bar: Task
    """The bar of all items. A job without threads advances it while it works on an item."""


class DoneMeanwhileError(Exception):
    """Another worker was faster with an item, so this one writes nothing."""


class Ranks(tp.Protocol):
    """The processes that work on each item together."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and decides."""

    def tell(self, obj: tp.Any) -> tp.Any:
        """The plain JSON that the first process passes; all of them have to call this."""


class _Alone:
    first = True

    def tell(self, obj: tp.Any) -> tp.Any:
        return obj


class Job(abc.ABC):
    """A stage with its config, opened in one process.

    A job opens its model, its dataset or its SAEs when they are first needed, once for all items.
    So a job that finds its result published opens none of them. Close it when all is done.
    """

    name: tp.ClassVar[str]
    """Of the stage, as in the chain."""
    opening: tp.ClassVar[str] = "look for the result"
    """What it takes to learn whether the result is published, for the log."""
    unit: tp.ClassVar[str] = ""
    """What the costs of items count, such as images; empty if each item has a bar of its own."""

    @classmethod
    def pieces(cls, found: Mapping[str, str]) -> int:
        """In how many pieces, for so many pods, a job is worth being cut; it need not be there yet.

        Args:
            found: URLs of results that it reads, by the names of stages.
        """
        del found
        return 1

    @property
    def title(self) -> str:
        """What the bar of all items is called."""
        return self.name

    @property
    def threads(self) -> int:
        """How many items are done at a time; one by default."""
        return 1

    @property
    def ranks(self) -> Ranks:
        """The processes that work on each item together; this one alone by default."""
        return _Alone()

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Hash of everything that the result depends on. Other inputs have another key."""

    @property
    @abc.abstractmethod
    def urls(self) -> tuple[str, ...]:
        """Where the result is, or will be."""

    @abc.abstractmethod
    def published(self) -> bool:
        """Whether the result is complete. Looks at storage.

        Raises:
            CorruptDataError: it is complete, and damaged.
        """

    def there(self) -> Sequence[str]:
        """Those of the URLs where a result is complete."""
        return self.urls if self.published() else ()

    @abc.abstractmethod
    def result(self) -> Result:
        """What is published."""

    @abc.abstractmethod
    def items(self) -> Sequence[Item]:
        """All items, whatever is done already: equal inputs give equal items in an equal order."""

    @abc.abstractmethod
    def done(self, item: Item) -> bool:
        """Whether an item is done. Looks at storage; may be called by several threads."""

    def outlook(self, todo: Sequence[Item]) -> Sequence[str]:
        """What is going to be done, in lines for people."""
        n = round(sum(item.cost for item in todo))
        return [f"{self.name}: {n:,} {self.unit} to do."] if self.unit else []

    def begin(self, todo: Sequence[Item]) -> None:  # noqa: B027 - most jobs have nothing to do
        """Prepare for these items. Raises at once if nothing can be written."""

    @abc.abstractmethod
    def work(self, item: Item, context: Context) -> None:
        """Do an item. Writes only objects of this item; a second call is harmless."""

    @abc.abstractmethod
    def publish(self, progress: Progress) -> None:
        """Check that all items are done, and publish the result.

        Raises:
            IncompleteError: an item is not done.
        """

    def tidy(self, items: Sequence[Item]) -> None:  # noqa: B027 - nothing may be left
        """Remove what is left of these items and nobody needs any more, as of killed workers."""

    def close(self) -> None:  # noqa: B027 - most jobs have nothing to close
        """Free the memory and the files that it holds."""


class Part(tp.NamedTuple):
    """Which of several equal slices of the items."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> tp.Self:
        """``I/N``; an empty text is all of the items.

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
        """The part of all items, whatever is done already; none if there are more parts."""
        n = len(items)
        return items[n * (self.number - 1) // self.of : n * self.number // self.of]
