"""The configs of `saev step …`, the commands that the pipeline's pods run."""

import json
import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.run import RunFile
from saev.config.stages import Stages, images_of, resolve
from saev.errors import ConfigError


def parse_json(text: str, flag: str) -> tp.Any:
    """The value of a flag that takes JSON. Raises ConfigError that says where it does not parse."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ConfigError(f"{flag} is {shown!r}, which is not JSON ({err}).") from err


class Step(Config):
    """What the steps that compute something have in common."""

    root: str
    """URL of the storage root."""
    config: str
    """What `saev run --config` takes, as JSON text."""
    owner: str = ""
    """Id of the pipeline run, in whose name datasets are claimed; empty claims nothing."""

    @property
    def file(self) -> RunFile:
        """The config. Raises ConfigError that names a wrong key."""
        return RunFile.from_dict(parse_json(self.config, "--config"), source="--config")


class DiscoverStep(Step):
    """Find datasets, fingerprint their listings, and claim what is not processed yet."""

    dataset: str = ""
    """URL of a dataset, or with --mode incoming of the folder whose folders are datasets; empty
    takes the images that the config's [data] table names."""
    mode: tp.Literal["one", "incoming"] = "one"
    """one: the dataset itself. incoming: the complete and new datasets in it."""
    marker: str = ""
    """Name of the object that says that a dataset is complete; empty goes by --settle-minutes."""
    settle_minutes: float = pydantic.Field(default=60.0, ge=0.0)
    """A dataset is complete when nothing in it has changed for so long."""
    claim_hours: float = pydantic.Field(default=24.0, gt=0.0)
    """How long a claim holds if its owner is not heard of."""
    max_datasets: int = pydantic.Field(default=10, ge=1)
    """Most datasets of one call."""
    to_first: str = ""
    """Where the first dataset is written, as JSON."""
    to_datasets: str = ""
    """Where the list of datasets is written, JSON of JSON texts."""


class DatasetStep(Step):
    """What the steps about one dataset have in common."""

    dataset: str
    """One of the datasets of `saev step discover`, as JSON text."""

    def stages(self, dataset: str, version: str) -> Stages:
        """The stages' configs for a dataset."""
        file = self.file
        return resolve(file, self.root, images_of(file, dataset, version), "--config")


class PlanShardsStep(DatasetStep):
    """Name the shards folder of a dataset, and cut what is not recorded yet into parts."""

    n_parts: int = pydantic.Field(default=8, ge=1)
    """Most parts."""
    to_shards: str = ""
    """Where the URL of the shards folder is written."""
    to_items: str = ""
    """Where the list of parts is written, JSON of JSON texts."""


class ShardsStep(DatasetStep):
    """What the steps on one shards folder have in common."""

    shards: str
    """URL of the shards folder."""


class PlanTrainingStep(ShardsStep):
    """Resolve the sweep into groups of SAEs that share their batches."""

    to_items: str = ""
    """Where the list of groups that are not trained yet is written, JSON of JSON texts."""


class PlanInferenceStep(ShardsStep):
    """List the trained SAEs, and cut the passes that are not done yet into parts."""

    n_parts: int = pydantic.Field(default=8, ge=1)
    """Most parts of one SAE's pass."""
    to_runs: str = ""
    """Where the list of run folders is written, as JSON."""
    to_items: str = ""
    """Where the list of parts is written, JSON of JSON texts."""


class ExtractStep(ShardsStep):
    """Record the activations of one part of a dataset."""

    item: str
    """One of plan-shards' items, as JSON text."""


class PublishStep(ShardsStep):
    """Verify all parts of a shards folder and publish it."""

    to_shards: str = ""
    """Where the URL of the shards folder is written."""
    executor_input: str = ""
    """KFP's inputs and outputs of the step, as JSON text."""


class TrainStep(ShardsStep):
    """Train one group of SAEs on the same batches; continues from its newest resume point."""

    item: str
    """One of plan-training's items, as JSON text."""


class InferStep(ShardsStep):
    """Run one SAE over one part of the activations."""

    item: str
    """One of plan-inference's items, as JSON text."""


class SummariseStep(ShardsStep):
    """Merge the parts of one SAE's pass, and draw its picture book."""

    run: str
    """URL of the run folder."""
    to_page: str = ""
    """Where a self-contained page of the first latents is written."""
    executor_input: str = ""
    """KFP's inputs and outputs of the step, as JSON text."""


class ReportStep(ShardsStep):
    """Compare all SAEs, write the root's index.html, and mark the dataset as processed."""

    runs: str
    """The list of run folders of plan-inference, as JSON text."""
    to_page: str = ""
    """Where the page is written."""
    executor_input: str = ""
    """KFP's inputs and outputs of the step, as JSON text."""


class OutcomeStep(Config):
    """Record how a pipeline run ended, and release the claims that it still holds."""

    root: str
    """URL of the storage root."""
    owner: str
    """Id of the pipeline run."""
    status: str = "{}"
    """What KFP knows of the steps before, as JSON text."""


class CheckStep(Config):
    """Write, read, claim and delete a small object: whether a pod can use the storage."""

    root: str
    """URL of the storage root."""
    dataset: str = ""
    """URL of a dataset that has to be readable too."""


STEPS: dict[str, type[Config]] = {
    "discover": DiscoverStep,
    "plan-shards": PlanShardsStep,
    "extract": ExtractStep,
    "publish": PublishStep,
    "plan-training": PlanTrainingStep,
    "train": TrainStep,
    "plan-inference": PlanInferenceStep,
    "infer": InferStep,
    "summarise": SummariseStep,
    "report": ReportStep,
    "outcome": OutcomeStep,
    "check": CheckStep,
}
"""The steps by name."""
