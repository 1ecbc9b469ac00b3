"""Images → activations."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def extract(job: str, slot: str):
    """Record the activations of one slot.

    Args:
        job: one of discover's jobs.
        slot: one of plan's slots, such as `2: part 3 of 8`.
    """
    return spec(GPU_IMAGE, "extract", job=job, slot=slot)
