"""SAEs and activations → codes and statistics."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def infer(job: str, slot: str):
    """Run the SAEs of one slot over their parts of the activations.

    Args:
        job: one of discover's jobs.
        slot: one of publish's slots, such as `2: part 3 of 8`.
    """
    return spec(GPU_IMAGE, "infer", job=job, slot=slot)
