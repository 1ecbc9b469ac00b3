"""Results that one job makes together, and of which each fails alone."""

import contextlib
import logging
import typing as tp
from collections.abc import Callable, Iterator, Sequence

from saev import storage
from saev.errors import SaevError

logger = logging.getLogger(__name__)

_T = tp.TypeVar("_T")


class Failures(tp.Generic[_T]):
    """Errors of some of the results of a job, which makes all others nevertheless.

    An error that concerns the only result, or the last one that is left, is raised at once.

    Args:
        results: all results.
        what: what they are, in the plural.
        before: errors of further results, which could not even be named.
    """

    def __init__(self, results: Sequence[_T], what: str, before: Sequence[SaevError] = ()):
        self._n, self._what = len(results) + len(before), what
        self._before = list(before)
        self._found: dict[_T, SaevError] = {}
        for err in before:
            self._note(err)

    def __contains__(self, result: _T) -> bool:
        return result in self._found

    def left(self, results: Sequence[_T]) -> list[_T]:
        """Those that have not failed."""
        return [one for one in results if one not in self._found]

    @contextlib.contextmanager
    def of(
        self,
        result: _T,
        safe_point: Callable[[], object] = lambda: None,
        but: type[SaevError] | tuple[()] = (),
    ) -> Iterator[None]:
        """Note an error of the block instead of raising it.

        Args:
            result: the result that the block is about. The block has no other effect than on it.
            safe_point: raises if the work has to stop as a whole.
            but: errors that are raised.
        """
        try:
            yield
        except but:
            raise
        except SaevError as err:
            safe_point()
            self.add(result, err)

    def add(self, result: _T, err: SaevError) -> None:
        """Note an error, which is raised if no result is left.

        Raises:
            SaevError: see :meth:`error`.
        """
        if result in self._found:
            return
        self._found[result] = err
        self._note(err)

    def error(self) -> SaevError | None:
        """What the job has to raise when it has done the rest; None if nothing has failed.

        Several errors are one that says all of them. The same may succeed later if it is so of one
        of them.
        """
        errors = [*self._before, *self._found.values()]
        texts = list(dict.fromkeys(map(str, errors)))
        if len(texts) < 2:
            return errors[0] if errors else None
        first = next(filter(storage.is_passing, errors), errors[0])
        both = type(first)(f"{len(errors)} of {self._n} {self._what} failed. {' '.join(texts)}")
        both.__dict__.update(first.__dict__)
        both.__cause__ = first
        return both

    def _note(self, err: SaevError) -> None:
        if len(self._before) + len(self._found) == self._n and (whole := self.error()) is not None:
            raise whole
        logger.error("One of %d %s failed, and the others go on: %s", self._n, self._what, err)
