"""All SAEs of a dataset beside each other."""

from kfp import dsl

from components.step import CPU_IMAGE, EXECUTOR_INPUT, spec


@dsl.container_component
def report(job: str, metrics: dsl.Output[dsl.Metrics], page: dsl.Output[dsl.HTML]):
    """Compare the SAEs, write the root's index.html, and mark the dataset as processed.

    Args:
        job: one of discover's jobs.
        metrics: number of SAEs, lowest NMSE.
        page: a table of all SAEs, and NMSE against L0 with the Pareto front.
    """
    return spec(CPU_IMAGE, "report", job=job, to_page=page.path, executor_input=EXECUTOR_INPUT)
