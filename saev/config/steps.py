"""The configs of `saev step …`, the commands that the pipeline's pods run."""

import json
import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.run import RunFile
from saev.errors import ConfigError


def parse_json(text: str, flag: str) -> tp.Any:
    """The value of a flag that takes JSON. Raises ConfigError that says where it does not parse."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ConfigError(f"{flag} is {shown!r}, which is not JSON ({err}).") from err


class _Claiming(Config):
    """What the steps have in common that claim datasets."""

    root: str
    """URL of the storage root."""
    config: str
    """What `saev run --config` takes, as JSON text."""
    owner: str = ""
    """Id of the pipeline run, in whose name datasets are claimed; empty claims nothing."""
    claim_hours: float = pydantic.Field(default=24.0, gt=0.0)
    """How long a claim holds if its owner is not heard of."""

    @property
    def file(self) -> RunFile:
        """The config. Raises ConfigError that names a wrong key."""
        return RunFile.from_dict(parse_json(self.config, "--config"), source="--config")


class DiscoverStep(_Claiming):
    """Fingerprint a dataset's listing, claim it, and write down the job."""

    dataset: str = ""
    """URL of the dataset; empty takes the images that the config's [data] table names."""
    claim: str = "{}"
    """What a firing has claimed for this run, as JSON text; {} claims the dataset now."""
    to_job: str = ""
    """Where the URL of the job is written."""


class Start(Config):
    """What a firing starts for each dataset, and where; `make schedule` writes it."""

    endpoint: str
    """URL of Kubeflow Pipelines' API inside the cluster."""
    experiment_id: str
    """Experiment of the runs."""
    pipeline_id: str
    """Pipeline of the runs."""
    version_id: str
    """Version of that pipeline; its steps have the images that it was compiled for."""
    service_account: str
    """Service account of the runs' pods."""
    arguments: dict[str, tp.Any] = pydantic.Field(default_factory=dict)
    """Parameters of the runs, beside those that a firing knows itself."""


class FireStep(_Claiming):
    """Find complete and new datasets below a prefix, claim them, and start a run of each."""

    dataset: str
    """URL of the folder whose folders are datasets."""
    marker: str = ""
    """Name of the object that says that a dataset is complete; empty goes by --settle-minutes."""
    settle_minutes: float = pydantic.Field(default=60.0, ge=0.0)
    """A dataset is complete when nothing in it has changed for so long."""
    max_datasets: int = pydantic.Field(default=4, ge=1)
    """Most runs of datasets below the prefix that may be unfinished at a time."""
    max_retries: int = pydantic.Field(default=2, ge=0)
    """How often a failed run is retried, if it did not fail for good."""
    start: str = "{}"
    """What is started, as JSON text; {} starts nothing."""
    to_runs: str = ""
    """Where the ids, datasets and claims of the runs that were started are written, as JSON."""

    @property
    def target(self) -> Start | None:
        """What is started; None if nothing is. Raises ConfigError that names a wrong key."""
        raw = parse_json(self.start, "--start")
        return Start.from_dict(raw, source="--start") if raw else None


class JobStep(Config):
    """What the steps about one dataset have in common."""

    job: str
    """URL of a job of `saev step discover`."""


class SlotStep(JobStep):
    """What the steps have in common that do one slot of what was planned."""

    slot: str
    """Number of one of the plan's slots; what follows behind a colon is for people."""


class ShowingStep(Config):
    """What the steps have in common that KFP's UI shows something of."""

    executor_input: str = ""
    """KFP's inputs and outputs of the step, as JSON text."""


class PlanStep(JobStep):
    """Name the shards folder of a dataset, and cut what is not recorded yet into slots."""

    n_parts: int = pydantic.Field(default=8, ge=1)
    """Most slots."""
    to_extract: str = ""
    """Where the slots of `saev step extract` are written, a JSON list of texts."""


class ExtractStep(SlotStep):
    """Record the activations of one slot."""


class PublishStep(JobStep, ShowingStep):
    """Verify all parts of a shards folder and publish it; plan training, passes and pictures."""

    n_parts: int = pydantic.Field(default=8, ge=1)
    """Most slots of each step; of summarise half as many."""
    to_train: str = ""
    """Where the slots of `saev step train` are written, a JSON list of texts."""
    to_infer: str = ""
    """Where the slots of `saev step infer` are written."""
    to_summarise: str = ""
    """Where the slots of `saev step summarise` are written."""


class TrainStep(SlotStep):
    """Train the groups of SAEs of one slot; continues from their newest resume points."""


class InferStep(SlotStep):
    """Run the SAEs of one slot over their parts of the activations."""


class SummariseStep(SlotStep, ShowingStep):
    """Merge the parts of each SAE's pass, and draw its picture book, for the SAEs of one slot."""

    to_page: str = ""
    """Where a self-contained page of the first latents is written."""


class ReportStep(JobStep, ShowingStep):
    """Compare all SAEs, write the root's index.html, and mark the dataset as processed."""

    to_page: str = ""
    """Where the HTML page is written: a table and a plot."""
    to_table: str = ""
    """Where the Markdown page is written: the table of SAEs, and where everything is."""


class LaunchStep(JobStep):
    """Do the slots of a step in pods of their own, which a Job of Kubernetes makes; follow them."""

    step: tp.Literal["extract", "train", "infer", "summarise"]
    """The step."""
    pods: str
    """How its pods are made: what `saev.launch.pods.PodSettings` takes, as JSON text."""
    parallelism: int = pydantic.Field(default=8, ge=1)
    """Most pods at the same time."""
    queue: str = ""
    """Queue of Kueue that says when they may start; empty starts them at once."""
    slot: str = ""
    """One slot alone, such as `2: part 3 of 8`, on several machines."""
    machines: int = pydantic.Field(default=1, ge=1)
    """Machines that do this slot together, as pods of a TrainJob of Kubeflow Trainer."""


class OutcomeStep(Config):
    """Record how a pipeline run ended, and release the claims that it still holds."""

    root: str
    """URL of the storage root."""
    owner: str
    """Id of the pipeline run."""
    status: str = "{}"
    """What KFP knows of the steps before, as JSON text."""
    launched: str = ""
    """Kinds of objects that steps have made in Kubernetes, such as `jobs`: those of this run that
    have not ended are deleted, and their pods end with resume points."""


class CheckStep(Config):
    """Write, read, claim and delete a small object: whether a pod can use the storage."""

    root: str
    """URL of the storage root."""
    dataset: str = ""
    """URL of a dataset that has to be readable too."""


STEPS: dict[str, type[Config]] = {
    "fire": FireStep,
    "discover": DiscoverStep,
    "plan": PlanStep,
    "extract": ExtractStep,
    "publish": PublishStep,
    "train": TrainStep,
    "infer": InferStep,
    "summarise": SummariseStep,
    "report": ReportStep,
    "launch": LaunchStep,
    "outcome": OutcomeStep,
    "check": CheckStep,
}
"""The steps by name."""
NAMES: dict[type[Config], str] = {kind: name for name, kind in STEPS.items()}
"""The name of a step by its config."""
SMALL = frozenset({"fire", "discover", "report", "launch", "outcome"})
"""Steps that need no torch. Their pods have the small image."""
