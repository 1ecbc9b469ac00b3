"""Activations → SAEs."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def train(job: str, slot: str):
    """Train the groups of one slot, each on the same batches, from their newest resume points.

    Args:
        job: one of discover's jobs.
        slot: one of publish's slots, such as `2: part 3 of 8`.
    """
    return spec(GPU_IMAGE, "train", job=job, slot=slot)
