"""Errors of single results of a job that makes several results."""

import contextlib
import logging
import typing as tp
from collections.abc import Callable, Iterator, Sequence

from saev import storage
from saev.errors import SaevError

logger = logging.getLogger(__name__)

_T = tp.TypeVar("_T")


class Failures(tp.Generic[_T]):
    """Collects the errors of single results of a job, which goes on with the other results.

    When all results have failed, the error is raised at once.

    Args:
        results: all results.
        what: what the results are, in the plural, for messages.
        before: errors of further results that have no name yet.
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
        """The results that have not failed."""
        return [one for one in results if one not in self._found]

    @contextlib.contextmanager
    def of(
        self,
        result: _T,
        safe_point: Callable[[], object] = lambda: None,
        but: type[SaevError] | tuple[()] = (),
    ) -> Iterator[None]:
        """Collect an error of the block instead of raising it.

        Args:
            result: the result that the block works on. The block must not affect other results.
            safe_point: called before an error is collected. It raises if the whole job has to stop.
            but: kinds of errors that are raised.
        """
        try:
            yield
        except but:
            raise
        except SaevError as err:
            safe_point()
            self.add(result, err)

    def add(self, result: _T, err: SaevError) -> None:
        """Collect an error. If all results have failed now, it is raised.

        Raises:
            SaevError: see :meth:`error`.
        """
        if result in self._found:
            return
        self._found[result] = err
        self._note(err)

    def error(self) -> SaevError | None:
        """The error to raise when the other results are done; None if nothing has failed.

        Several errors become one error with all of their texts. It is passing (a retry may succeed)
        if one of them is.
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
