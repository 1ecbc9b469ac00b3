"""What there is to record."""

from kfp import dsl

from components.step import GPU_IMAGE, spec


@dsl.container_component
def plan(job: str, n_parts: int, extract: dsl.OutputPath(list)):
    """Name the shards folder of a dataset, and cut what is not recorded yet into slots.

    Loads the model (on the CPU) for its shapes and the checksum of its weights.

    Args:
        job: one of discover's jobs.
        n_parts: most slots, that is pods.
        extract: slots of the step extract; empty if all is recorded.
    """
    return spec(GPU_IMAGE, "plan", job=job, n_parts=n_parts, to_extract=extract)
