"""All parts → one complete shards folder, and what there is to do with it."""

from kfp import dsl

from components.step import EXECUTOR_INPUT, GPU_IMAGE, spec


@dsl.container_component
def publish(
    job: str,
    n_parts: int,
    metrics: dsl.Output[dsl.Metrics],
    train: dsl.OutputPath(list),
    infer: dsl.OutputPath(list),
    summarise: dsl.OutputPath(list),
):
    """Verify every part, check that the dataset is what was recorded, publish; plan the SAEs.

    All that follows is known before training: the sweep names its SAEs, and the shards say how
    many pieces a pass over them has. So one pod plans all of it.

    Args:
        job: one of discover's jobs.
        n_parts: most slots of each step.
        metrics: number of examples, tokens, shards and bytes.
        train: slots of groups that are not trained yet.
        infer: slots of passes, or parts of them, that are not measured yet.
        summarise: slots of SAEs without results or pictures.
    """
    return spec(
        GPU_IMAGE,
        "publish",
        job=job,
        n_parts=n_parts,
        to_train=train,
        to_infer=infer,
        to_summarise=summarise,
        executor_input=EXECUTOR_INPUT,
    )
