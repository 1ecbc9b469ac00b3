"""Runs a job: does the missing items, then publishes the result.

The same code runs a command without and with ``--part``, a pod with its slot, and the ranks of a
training. The items of a part never change. Items that are done are skipped.
"""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from saev import storage
from saev.errors import CheckpointError, IncompleteError, RankError, StorageError
from saev.progress import Progress
from saev.stage import Context, DoneMeanwhileError, Item, Job, Part, Result

logger = logging.getLogger(__name__)

_N_LOOKS = 16
"""Items whose state is checked at the same time."""


def run_job(job: Job, part: str = "", progress: Progress | None = None) -> Result:
    """Do the missing items, publish, and close the job.

    Args:
        job: the job.
        part: ``I/N`` does only this part of the items and does not publish.
        progress: where progress is shown.

    Returns:
        The published result. With ``part``, only its future URLs.

    Raises:
        ConfigError: ``part`` is not of the form I/N.
        SaevError: an error of the job. Finished items are kept, and the same call continues.
    """
    wanted, progress = Part.parse(part), progress or Progress(quiet=True)
    with contextlib.closing(job):
        with progress.doing(job.opening) as task, storage.told_of_files(task.see):
            items = wanted.slice(job.items())
        do_items(job, items, progress)
        if not part:
            return finish(job, progress)
        _raise_failure(job)
        logger.info("Part %s of %s is done.", part, _named(job))
        return Result(job.urls)


def do_items(job: Job, items: Sequence[Item], progress: Progress | None = None) -> None:
    """Do the missing items of an opened job. Does nothing if its result is published.

    Raises:
        SaevError: the error of the first item that fails.
    """
    progress = progress or Progress(quiet=True)
    ranks = job.ranks
    todo = [Item(*row) for row in ranks.tell(_todo(job, items) if ranks.first else None)]
    if todo:
        if ranks.first:
            for line in job.outlook(todo):
                logger.info("%s", line)
            job.begin(todo)
        with _context(job, items, todo, progress) as context:
            (_in_threads if job.threads > 1 else _in_turn)(job, todo, context)
    if ranks.first:
        job.tidy(items)


def finish(job: Job, progress: Progress | None = None) -> Result:
    """Publish the result of an opened job, unless it is published, and tidy up.

    Raises:
        IncompleteError: an item is not done.
        SaevError: some results failed alone. The others are published.
    """
    progress = progress or Progress(quiet=True)
    if job.ranks.first:
        if not job.published():
            with unless_done(job.published, "Another worker has published it meanwhile"):
                job.publish(progress)
        job.tidy(job.items())
        _raise_failure(job)
        logger.info("%s is complete.", _named(job))
    return job.result()


def end_part(job: Job, progress: Progress | None = None) -> None:
    """Raise the error of results that failed alone, if there is one.

    Nobody may come to publish the others after this failure. So they are published here, unless
    items of other parts are missing.
    """
    failure = job.failure()
    if failure is not None:
        with contextlib.suppress(IncompleteError):
            finish(job, progress)
        raise failure


def _raise_failure(job: Job) -> None:
    failure = job.failure()
    if failure is not None:
        raise failure


def _named(job: Job) -> str:
    """The result in a log line: its first URL, and the number of further URLs."""
    first, *others = job.urls
    return f"{first} (and {len(others)} more)" if others else first


def _todo(job: Job, items: Sequence[Item]) -> list[Item]:
    if job.published():
        return []
    _ = job.key  # opens the inputs once, before the threads use them
    with concurrent.futures.ThreadPoolExecutor(_N_LOOKS, "saev-items") as pool:
        done = list(pool.map(job.done, items))
    return [item for item, is_done in zip(items, done, strict=True) if not is_done]


@contextlib.contextmanager
def _context(
    job: Job, items: Sequence[Item], todo: Sequence[Item], progress: Progress
) -> Iterator[Context]:
    total = round(sum(item.cost for item in items))
    done = total - round(sum(item.cost for item in todo))
    if not job.unit:
        with progress.task(job.title, total=None, unit="") as bar:
            yield Context(progress, bar)
        return
    if done:
        logger.info("%d of %d %s are done already.", done, total, job.unit)
    with progress.task(job.title, total=total, unit=job.unit, done=done, is_main=True) as bar:
        yield Context(progress, bar)


def _in_turn(job: Job, todo: Sequence[Item], context: Context) -> None:
    for item in todo:
        _one(job, item, context)


def _in_threads(job: Job, todo: Sequence[Item], context: Context) -> None:
    pool = concurrent.futures.ThreadPoolExecutor(job.threads, "saev-work")
    with pool:
        futures = {pool.submit(_one, job, item, context): item for item in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                context.bar.advance(round(futures[future].cost))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one(job: Job, item: Item, context: Context) -> None:
    ranks = job.ranks
    if ranks.tell(job.done(item) if ranks.first else None):  # another worker was faster
        if job.unit and job.threads == 1:
            context.bar.advance(round(item.cost))
        return
    with unless_done(
        lambda: job.done(item) or job.published(),
        f"{item.name} of {_named(job)} was done by another worker meanwhile",
    ):
        job.work(item, context)


@contextlib.contextmanager
def unless_done(done: Callable[[], bool], said: str) -> Iterator[None]:
    """Turn errors of the block into a warning if another worker has done the work.

    Such a worker may have deleted objects that this one needed.

    Args:
        done: returns whether the work is done.
        said: start of the warning.
    """
    try:
        yield
    except (StorageError, CheckpointError, RankError, DoneMeanwhileError) as err:
        if not done():
            raise
        logger.warning("%s%s", said, f". Here: {err}" if str(err) else ".")
