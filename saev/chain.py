"""The list of all stages, in order. `saev run`, the command line and the pipeline's steps use it.

A new stage is a config, a module with a :class:`saev.stage.Job`, and an entry here.
"""

import importlib
import typing as tp
from collections.abc import Callable, Mapping, Sequence

from saev.config import InferenceCommand, ShardsConfig, TrainConfig, VisualsCommand
from saev.config.base import Config
from saev.config.stages import Stages
from saev.errors import SaevError
from saev.stage import Job

Found = Mapping[str, str]
"""URLs of the results of previous stages, by stage name. For training, it is the URL of one run."""


class Stage(tp.NamedTuple):
    """Description of a stage. The code of the stage is imported only when a job is opened."""

    name: str
    """Name of its command, and of its table in the file of `saev run`."""
    config: type[Config]
    """Class of its configs."""
    job: str
    """Its job class, as ``module:class``."""
    slots: str
    """The step of the pipeline whose pods do its items."""
    make_config: Callable[[Stages, Found], Config]
    """Makes the config of a job."""
    of_run: bool = False
    """Whether a job is for some runs of training: one run, or several together at less cost."""
    whole: bool = False
    """Whether one pod does a whole job. This pod also finishes the previous stages' jobs of the
    same runs."""
    swept: bool = False
    """Whether its jobs also take a sweep: the arguments `table` and `explicit`."""

    @property
    def kind(self) -> tp.Any:
        """The job class. Imports the code of the stage."""
        module, _, name = self.job.partition(":")
        return getattr(importlib.import_module(module), name)

    def of(self, stages: Stages, found: Found, device: str = "") -> Job:
        """Open a job.

        Args:
            stages: the configs of all stages.
            found: the results that it reads.
            device: replaces the device of the config.
        """
        cfg = self._config(stages, found, device)
        job: Job = self.kind(cfg, **({"table": stages.sweep} if self.swept else {}))
        return job

    def of_all(self, stages: Stages, found: Sequence[Found], device: str = "") -> Job:
        """Open a job that does the work of several runs together.

        A run whose config cannot be read fails alone, see :meth:`saev.stage.Job.failure`.
        """
        configs: list[Config] = []
        failed: list[SaevError] = []
        for one in found:
            try:
                configs.append(self._config(stages, one, device))
            except SaevError as err:
                failed.append(err)
        job: Job = self.kind(configs, failed)
        return job

    def _config(self, stages: Stages, found: Found, device: str) -> Config:
        cfg = self.make_config(stages, found)
        if device and "device" in type(cfg).model_fields:
            cfg = cfg.model_copy(update={"device": device})
        return cfg


STAGES = (
    Stage(
        "shards", ShardsConfig, "saev.shards.extract:Recording", "extract",
        lambda stages, found: stages.shards,
    ),
    Stage(
        "train", TrainConfig, "saev.train.stage:Training", "train",
        lambda stages, found: stages.training(found["shards"]), swept=True,
    ),
    Stage(
        "inference", InferenceCommand, "saev.inference.stage:Measuring", "infer",
        lambda stages, found: stages.measuring(found["train"], found["shards"]), of_run=True,
    ),
    Stage(
        "visuals", VisualsCommand, "saev.visuals.stage:Drawing", "summarise",
        lambda stages, found: stages.showing(found["train"], found["shards"], found["inference"]),
        of_run=True, whole=True,
    ),
)  # fmt: skip
OF_ALL = tuple(stage for stage in STAGES if not stage.of_run)
OF_RUN = tuple(stage for stage in STAGES if stage.of_run)
FIRST = OF_ALL[0]
RUNS = OF_ALL[-1].name
"""The stage whose results are the runs."""


def of_slots(step: str) -> Stage:
    """The stage whose items are done by a step of the pipeline."""
    return next(stage for stage in STAGES if stage.slots == step)


def planner(step: str) -> str:
    """The step that plans the slots of another step.

    Slots of the first stage are planned at the start, and all others when its result is published.
    """
    return "plan" if step == FIRST.slots else "publish"


def before(stage: Stage) -> tuple[Stage, ...]:
    """The stages whose jobs a pod of this stage finishes first; none if other pods do that."""
    return OF_RUN[: OF_RUN.index(stage)] if stage.whole else ()


def tables(step: str) -> tuple[str, ...]:
    """The tables of the config file that a step of the pipeline uses, the most likely first."""
    if step == "plan":
        return (FIRST.name,)
    if step == "publish":
        return tuple(stage.name for stage in STAGES if not stage.whole)
    found = [stage for stage in STAGES if stage.slots == step]
    return tuple(s.name for stage in found for s in (*before(stage), stage))
