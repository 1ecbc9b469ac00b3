"""A firing of a schedule: one run of Kubeflow Pipelines for each dataset that is complete and new.

A firing may be killed at any point, the answer to a request may be lost, and two firings may run at
the same time. So a firing claims a dataset before it starts the dataset's run. The run gets the
name of the firing, and takes over the claim only if that firing still holds it. The next firing
reads the claim, asks Kubeflow about the run of its owner, and decides by both. So each state of a
dataset has exactly one run that processes it. A run that comes too late finds that the claim is
gone, and ends.

If Kubeflow does not know the owner of a claim (it belongs to another installation on the same
storage, or the run was deleted), the dataset waits until the claim is released or expires.
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


class NoRuns:
    """Starts no runs. The caller reads the firing's output and starts them."""

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
        runs: the runs of the installation.
        version: id of the pipeline's version that is started; "" if nothing is started.
    """

    def __init__(self, cfg: FireStep, runs: Runs, version: str = ""):
        self._cfg, self._runs, self._version = cfg, runs, version
        self._raw_config = parse_json(cfg.config, "--config")
        self._more = dict(target.arguments) if (target := cfg.target) else {}
        self._root = storage.normalize(cfg.root)
        self._prefix = storage.normalize(cfg.dataset)
        self._n_unfinished = 0
        self.started: list[dict[str, tp.Any]] = []
        """Id, dataset and claim of each run that was started."""

    def run(self, seen: discover.Seen = lambda n: None) -> None:
        """Look at every dataset, and start or retry its run where needed.

        Args:
            seen: progress callback of the listing.

        Raises:
            ClusterError: Kubeflow refused a request. It is raised after the other datasets.
            SaevError: the storage failed.
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
        """Whether a firing of this prefix and this root started a run."""
        values = run.parameters
        return (
            bool(values.get("claim"))
            and values.get("root") == self._root
            and str(values.get("dataset", "")).startswith(self._prefix + "/")
        )

    def _look_at(self, dataset: Dataset) -> None:
        """Start or retry a dataset's run, or do nothing."""
        claim = claims.current(discover.claims_of(self._root, dataset))
        if claim is None:
            self._start(dataset, None)
            return
        run = self._started_for(dataset, claim) or self._runs.get(claim.owner)
        if run is None:
            is_free = not claim.is_held or claim.owner == self._cfg.owner
        elif not run.parameters.get("claim"):  # it is a firing, or a person started it
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
        else:  # a run that failed with another version of the pipeline may succeed with this one
            is_free = run.is_over
        if is_free:
            self._start(dataset, claim)
        else:
            who = _called(run) if run else claim.describe()
            logger.info("%s is being processed by %s.", dataset.name, who)

    def _started_for(self, dataset: Dataset, claim: Claim) -> Run | None:
        """The run that a firing started for its claim, if the run has not taken it over yet."""
        for run in self._runs.named(_name(dataset)):
            handed = run.parameters.get("claim")
            if isinstance(handed, dict) and handed.get("run") == claim.owner:
                return run
        return None

    def _has_room(self, dataset: Dataset) -> bool:
        most = self._cfg.max_datasets
        if self._n_unfinished < most:
            return True
        logger.info("%s waits: %d runs are unfinished (max_datasets).", dataset.name, most)
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
        # Its former run may have finished it before the claim was taken.
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
        """Retry a failed run, if a retry may help."""
        cfg = self._cfg
        failures = outcomes.failures(self._root, run.run_id, run.ended_before)
        permanent = outcomes.permanent(failures)
        if permanent is not None:
            logger.warning(
                "%s: %s failed permanently in step %s, so it is not retried: %s When that is "
                "fixed, press Retry in Kubeflow or submit the dataset.",
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
    """Name of the run of a dataset in one state. Every firing makes the same name."""
    return f"saev {dataset.name[:_LONGEST_NAME]} {dataset.key[:_DIGITS]}"


def _called(run: Run) -> str:
    return f"run {run.name} ({run.run_id})"


def _why(failures: collections.abc.Sequence[outcomes.Failure]) -> str:
    """The reason of a failure that may pass, as far as it is known."""
    if not failures:
        return "no step recorded a reason, as when a pod is evicted or lost with its node."
    return f"step {failures[0].step} failed: {failures[0].error}"
