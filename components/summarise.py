"""What SAEs learned: their figures and their picture books."""

from kfp import dsl

from components.step import EXECUTOR_INPUT, GPU_IMAGE, spec


@dsl.container_component
def summarise(
    job: str,
    slot: str,
    metrics: dsl.Output[dsl.Metrics],
    picture_book: dsl.Output[dsl.HTML],
):
    """Merge the parts of each SAE's pass exactly, and draw what its latents respond to.

    Args:
        job: one of discover's jobs.
        slot: one of publish's slots, such as `2: part 3 of 8`.
        metrics: NMSE, L0, dead latents and more of the SAE, with its name; of several SAEs, a line
            each.
        picture_book: the first latents of each SAE, in one self-contained file.
    """
    return spec(
        GPU_IMAGE,
        "summarise",
        job=job,
        slot=slot,
        to_page=picture_book.path,
        executor_input=EXECUTOR_INPUT,
    )
