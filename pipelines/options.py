"""What is constant in a compiled pipeline. KFP takes these things at compile time only."""

import typing as tp

import pydantic

from saev.config import Config

PIPELINES: tuple[str, ...] = ("saev", "saev-incoming")
"""The pipelines there are: one dataset, and every new dataset below a prefix."""
PipelineName = tp.Literal["saev", "saev-incoming"]

_HOURS: dict[str, float] = {
    "discover": 1, "plan": 2, "extract": 48, "publish": 6, "train": 168, "infer": 48,
    "summarise": 24, "report": 2, "outcome": 1,
}  # fmt: skip


class CompileOptions(Config):
    """Constants of a compiled pipeline; everything else is a parameter of its runs."""

    image: str
    """The runtime image, by an immutable tag or a digest."""
    cpu_image: str
    """The small image for steps that need no torch; may be the runtime image."""
    storage: tp.Literal["object", "pvc"] = "object"
    """object: datasets and results are on object storage. pvc: a volume is mounted at /data."""
    parallelism: int = pydantic.Field(default=8, ge=1)
    """Most pods of one loop at the same time."""
    retries: int = pydantic.Field(default=3, ge=0)
    """How often a step is run again: by its supervisor in an hour, and by Argo in new pods, for
    those failures that the installation retries."""
    timeout_hours: dict[str, float] = pydantic.Field(default_factory=dict)
    """Hours after which a step is stopped, where the defaults do not fit."""
    shm_size: str = "2Gi"
    """Size limit of /dev/shm in GPU pods; it counts as memory of the pod."""

    @pydantic.field_validator("timeout_hours")
    @classmethod
    def _known_steps(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = value.keys() - _HOURS.keys()
        if unknown or any(hours <= 0 for hours in value.values()):
            raise ValueError(f"expected positive hours of steps among {', '.join(_HOURS)}")
        return value

    def timeout_seconds(self, step: str) -> int:
        """How long a pod of a step may run."""
        return round(3600 * {**_HOURS, **self.timeout_hours}[step])
