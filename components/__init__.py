"""KFP components: one container step each, around `python -m saev step …` of the project's image.

Parameters are small JSON and URLs. Activations and checkpoints never become artifacts, which the
launcher would copy; a step's artifacts are its metrics and a page of HTML.

The images named here are placeholders: `pipelines.definition` sets the ones that a pipeline is
compiled for.
"""

from components.discover import discover
from components.extract import extract
from components.infer import infer
from components.outcome import outcome
from components.plan import plan_inference, plan_shards, plan_training
from components.publish import publish
from components.report import report
from components.summarise import summarise
from components.train import train

__all__ = [
    "discover",
    "extract",
    "infer",
    "outcome",
    "plan_inference",
    "plan_shards",
    "plan_training",
    "publish",
    "report",
    "summarise",
    "train",
]
