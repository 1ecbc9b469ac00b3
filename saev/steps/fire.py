"""A firing of a schedule: one run of Kubeflow Pipelines for each dataset that is complete and new.

A firing may be killed at any point, the answer to a request may be lost, and two firings may meet.
So a dataset is claimed before its run is started; the run is told whose claim it has, and takes it
over only if that claim still counts. Whatever happened before, the next firing looks at the claim,
asks Kubeflow what became of the run behind it, and goes on from there: a state of a dataset has one
run that processes it, and never none. A run that comes too late finds the claim gone and ends.

What Kubeflow does not know of (another installation on the same storage, a run that was deleted) is
left alone until its claim is given back or expires.
"""

import collections.abc
import logging
import typing as tp

from saev import storage
from saev.config.steps import FireStep, parse_json
from saev.errors import ClusterError, ConfigError
from saev.launch import outcomes
from saev.launch.runs import Run, Runs
from saev.steps import claims, discover
from saev.steps.claims import Claim
from saev.steps.discover import Dataset

logger = logging.getLogger(__name__)

_LONGEST_NAME = 100
_DIGITS = 12


class Nothing:
    """Starts nothing: whoever reads a firing's output starts its runs."""

    def get(self, run_id: str) -> Run | None:
        """See :class:`~saev.launch.runs.Runs`."""
        del run_id
        return None

    def named(self, name: str) -> list[Run]:
        """See :class:`~saev.launch.runs.Runs`."""
        del name
        return []

    def unfinished(self) -> list[Run]:
        """See :class:`~saev.launch.runs.Runs`."""
        return []

    def start(self, name: str, description: str, parameters: dict[str, tp.Any]) -> str:
        """See :class:`~saev.launch.runs.Runs`."""
        del description, parameters
        return name

    def retry(self, run_id: str) -> None:
        """See :class:`~saev.launch.runs.Runs`."""
        raise AssertionError(f"there is no run {run_id}")


class Firing:
    """One firing.

    Args:
        cfg: the step's config.
        runs: the installation's runs.
        version: id of the version of the pipeline that is started; "" if nothing is.
    """

    def __init__(self, cfg: FireStep, runs: Runs, version: str = ""):
        self._cfg, self._runs, self._version = cfg, runs, version
        self._raw_config = parse_json(cfg.config, "--config")
        self._more = dict(target.arguments) if (target := cfg.target) else {}
        self._root = storage.normalize(cfg.root)
        self._prefix = storage.normalize(cfg.dataset)
        self._n_unfinished = 0
        self.started: list[dict[str, tp.Any]] = []
        """Of each run that was started: its id, dataset and claim."""

    def run(self, seen: discover.Seen = lambda n: None) -> None:
        """Look at every dataset.

        Args:
            seen: told of files while they are listed.

        Raises:
            ClusterError: Kubeflow refused a request, after the other datasets had their turn.
            SaevError: as storage does.
        """
        cfg = self._cfg
        if not cfg.owner:
            raise ConfigError("--owner is empty; a firing claims datasets in the name of its run.")
        self._n_unfinished = sum(map(self._is_ours, self._runs.unfinished()))
        failed: ClusterError | None = None
        found = discover.candidates(
            cfg.root,
            cfg.dataset,
            cfg.file,
            marker=cfg.marker,
            settle_minutes=cfg.settle_minutes,
            seen=seen,
        )
        for dataset in found:
            try:
                self._look_at(dataset)
            except ClusterError as err:
                logger.error("%s: %s", dataset.name, err)
                failed = failed or err
        if failed is not None:
            raise failed

    def _is_ours(self, run: Run) -> bool:
        """Whether a firing of this prefix, with this root, started a run."""
        values = run.parameters
        return (
            bool(values.get("claim"))
            and values.get("root") == self._root
            and str(values.get("dataset", "")).startswith(self._prefix + "/")
        )

    def _look_at(self, dataset: Dataset) -> None:
        """Start or retry a dataset's run, or leave it alone."""
        claim = claims.current(discover.claims_of(self._root, dataset))
        if claim is None:
            self._start(dataset, None)
            return
        run = self._started_for(dataset, claim) or self._runs.get(claim.owner)
        if run is None:
            is_free = not claim.is_held or claim.owner == self._cfg.owner
        elif not run.parameters.get("claim"):  # a firing, or a run that a person started
            is_free = run.is_over or not claim.is_held or run.run_id == self._cfg.owner
        elif run.state == "FAILED" and run.version == self._version:
            self._failed(dataset, claim, run)
            return
        elif run.state == "CANCELED":
            logger.info(
                "%s: %s was canceled, so it stays as it is until somebody retries it or submits "
                "the dataset.", dataset.name, _called(run),
            )  # fmt: skip
            return
        else:  # what failed with another version of the pipeline may succeed with this one
            is_free = run.is_over
        if is_free:
            self._start(dataset, claim)
        else:
            who = _called(run) if run else claim.describe()
            logger.info("%s is being processed by %s.", dataset.name, who)

    def _started_for(self, dataset: Dataset, claim: Claim) -> Run | None:
        """The run that a firing started with its claim, and that has not taken it over yet."""
        for run in self._runs.named(_name(dataset)):
            handed = run.parameters.get("claim")
            if isinstance(handed, dict) and handed.get("run") == claim.owner:
                return run
        return None

    def _has_room(self, dataset: Dataset) -> bool:
        most = self._cfg.max_datasets
        if self._n_unfinished < most:
            return True
        logger.info("%s waits: %d runs go on, as many as may (max_datasets).", dataset.name, most)
        return False

    def _start(self, dataset: Dataset, before: Claim | None) -> None:
        """Claim a dataset and start its run."""
        cfg, folder = self._cfg, discover.claims_of(self._root, dataset)
        if not self._has_room(dataset):
            return
        if before is not None and before.owner == cfg.owner:
            taken = claims.renew(before)  # an earlier try of this step claimed it
        else:
            taken = claims.take_from(folder, before, cfg.owner, cfg.claim_hours)
        if taken is None:
            logger.info("%s was claimed by somebody else just now.", dataset.name)
            return
        # Between the look and the claim, its run may have finished it.
        if discover.is_processed(self._root, dataset):
            claims.release(folder, cfg.owner)
            return
        own = {"dataset": dataset.url, "claim": discover.claim_for(dataset, cfg.owner)}
        parameters = {
            **self._more,
            "root": self._root,
            "config": self._raw_config,
            "claim_hours": cfg.claim_hours,
            **own,
        }
        run_id = self._runs.start(_name(dataset), f"{dataset.url}, new in a schedule", parameters)
        logger.info("%s: started run %s.", dataset.name, run_id)
        self._n_unfinished += 1
        self.started.append({"run_id": run_id, **own})

    def _failed(self, dataset: Dataset, claim: Claim, run: Run) -> None:
        """Retry a failed run, if that may help."""
        cfg = self._cfg
        failures = outcomes.failures(self._root, run.run_id, run.ended_before)
        permanent = outcomes.permanent(failures)
        if permanent is not None:
            logger.warning(
                "%s: %s failed for good in step %s, so it is not tried again: %s When that is "
                "mended, press Retry in Kubeflow or submit the dataset.",
                dataset.name, _called(run), permanent.step, permanent.error,
            )  # fmt: skip
            return
        if claim.retries >= cfg.max_retries:
            logger.warning(
                "%s: %s has failed %d times, so it is not retried any more (max_retries = %d). "
                "Press Retry in Kubeflow or submit the dataset.",
                dataset.name, _called(run), claim.retries + 1, cfg.max_retries,
            )  # fmt: skip
            return
        if not self._has_room(dataset):
            return
        if claims.hand_over(claim, run.run_id, cfg.claim_hours, again=True) is None:
            logger.info("%s was claimed by somebody else just now.", dataset.name)
            return
        logger.info(
            "%s: retrying %s, %d of %d times: %s",
            dataset.name, _called(run), claim.retries + 1, cfg.max_retries, _why(failures),
        )  # fmt: skip
        self._runs.retry(run.run_id)
        self._n_unfinished += 1


def _name(dataset: Dataset) -> str:
    """Name of the run of a dataset in one state: the same for every firing."""
    return f"saev {dataset.name[:_LONGEST_NAME]} {dataset.key[:_DIGITS]}"


def _called(run: Run) -> str:
    return f"run {run.name} ({run.run_id})"


def _why(failures: collections.abc.Sequence[outcomes.Failure]) -> str:
    """What is known of a failure that a new pod may mend."""
    if not failures:
        return "no step said why it failed, as when a pod is evicted or lost with its node."
    return f"step {failures[0].step} failed: {failures[0].error}"
