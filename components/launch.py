"""Another step's slots, in pods that a Job of Kubernetes or a TrainJob of Kubeflow makes."""

import json
import typing as tp

from kfp import dsl
from kfp.dsl import base_component

from components.step import CPU_IMAGE, spec


def launch(
    step: str, pods: tp.Mapping[str, tp.Any], parallelism: int, queue: str
) -> base_component.BaseComponent:
    """A component that does all slots of a step and is called like it.

    Args:
        step: extract, train, infer or summarise.
        pods: how the pods are made; `saev.launch.pods.PodSettings` says what there is.
        parallelism: most pods at the same time.
        queue: Kueue's queue; empty starts them at once.
    """

    def slots(job: str):  # type: ignore[no-untyped-def] # as kfp has it
        """Make a Job with a pod for each slot, and follow it to its end.

        Args:
            job: one of discover's jobs.
        """
        return _spec(pods, queue, job=job, step=step, parallelism=str(parallelism))

    slots.__name__ = step  # kfp calls the component so
    return dsl.container_component(slots)


def launch_machines(
    pods: tp.Mapping[str, tp.Any], n: int, queue: str
) -> base_component.BaseComponent:
    """A component that does one slot of training on several machines, and is called train.

    Args:
        pods: how the pod of each machine is made.
        n: how many machines.
        queue: Kueue's queue; empty starts them at once.
    """

    @dsl.container_component
    def train(job: str, slot: str):  # type: ignore[no-untyped-def] # as kfp has it
        """Make a TrainJob of several machines for one slot, and follow it to its end.

        Args:
            job: one of discover's jobs.
            slot: one of publish's slots, such as `2: part 3 of 8`.
        """
        return _spec(pods, queue, job=job, slot=slot, step="train", machines=str(n))

    return train


def _spec(pods: tp.Mapping[str, tp.Any], queue: str, **flags: tp.Any) -> dsl.ContainerSpec:
    """`saev step launch`, with the pods as JSON, and a queue if there is one."""
    if queue:
        flags["queue"] = queue
    return spec(CPU_IMAGE, "launch", pods=json.dumps(pods, separators=(",", ":")), **flags)
