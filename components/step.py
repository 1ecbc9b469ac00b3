"""What all components share: the image's names and its command line.

What a loop runs over is a list of texts: the compiler declares the items of a list to be texts, and
the backend refuses a text where a component expects something else.
"""

import typing as tp

from kfp import dsl

GPU_IMAGE = "saev"
"""The runtime image: torch and all of saev."""
CPU_IMAGE = "saev-cpu"
"""The small one, for steps that read listings, JSON and pictures; it has no torch."""

EXECUTOR_INPUT = "{{$}}"
"""KFP puts the step's inputs and outputs here, as JSON: where artifacts and their metadata go."""

SUPERVISOR = ("python", "-m", "saev.steps.supervisor")
"""The command of every step: it runs `saev` as its child."""


def spec(image: str, step: str, /, **flags: tp.Any) -> dsl.ContainerSpec:
    """`saev step STEP --flag value …`, run by the supervisor, which tries passing failures again.

    The command is whole, not an addition to the image's entry point: on a cluster, the launcher
    takes the entry point's place.

    Args:
        image: one of the names above.
        step: name of the step.
        flags: flag, with underscores → input, output path or constant.
    """
    args = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    return dsl.ContainerSpec(image=image, command=[*SUPERVISOR, "step", step], args=args)
