"""KFP components: one container step each, around `python -m saev step …` of the project's image.

A step gets the URL of its job and the number of its slot, and looks up everything else below the
root (`saev.steps.jobs`): what is an input is repeated about ten times for each pod in the one
object that Kubernetes keeps of a run. Activations and checkpoints never become artifacts, which the
launcher would copy; a step's artifacts are its metrics and pages for people.

The images named here are placeholders: `pipelines.definition` sets the ones that a pipeline is
compiled for.
"""

from components.discover import discover
from components.extract import extract
from components.fire import fire
from components.infer import infer
from components.launch import launch, launch_machines
from components.outcome import outcome
from components.plan import plan
from components.publish import publish
from components.report import report
from components.summarise import summarise
from components.train import train

__all__ = [
    "discover",
    "extract",
    "fire",
    "infer",
    "launch",
    "launch_machines",
    "outcome",
    "plan",
    "publish",
    "report",
    "summarise",
    "train",
]
