"""How a pipeline run ended."""

from kfp import dsl

from components.step import CPU_IMAGE, spec


@dsl.container_component
def outcome(root: str, owner: str, launched: str, status: dsl.PipelineTaskFinalStatus):
    """Record the outcome, and release the claims of datasets that were not finished.

    Args:
        root: URL of the storage root.
        owner: id of the pipeline run.
        launched: kinds of objects that steps have made in Kubernetes; empty for none.
        status: what KFP knows of the steps before.
    """
    return spec(CPU_IMAGE, "outcome", root=root, owner=owner, launched=launched, status=status)
