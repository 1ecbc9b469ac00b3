"""The steps of a pipeline, done one after the other as KFP has its pods do them."""

import json
import typing as tp
from pathlib import Path

from saev import cli
from saev.progress import Progress
from saev.steps import step


class Walk:
    """The steps of one pipeline run on one dataset, as its pods do them, in this process.

    Args:
        root: URL of the storage root.
        config: the config, as JSON text.
        to: a folder for what KFP passes on.
        owner: id of the run.
    """

    PLANNERS: tp.ClassVar = {
        "extract": "plan", "train": "publish", "infer": "publish", "summarise": "publish",
    }  # fmt: skip
    """The step that plans the slots of another one."""

    def __init__(self, root: str, config: str, to: Path, owner: str = ""):
        self.root, self._config, self._to, self._owner = root, config, to, owner
        to.mkdir(parents=True, exist_ok=True)
        self.job = ""

    def discover(self, *words: str) -> str:
        """Returns the job's URL, which the other steps get."""
        self._run("discover", "--root", self.root, "--config", self._config,
                  "--owner", self._owner, "--to-job", self._place("job"), *words)  # fmt: skip
        self.job = Path(self._place("job")).read_text()
        return self.job

    def fire(self, *words: str) -> list[dict]:
        """A firing of a schedule, which starts nothing. Returns what it would start."""
        self._run("fire", "--root", self.root, "--config", self._config,
                  "--owner", self._owner, "--to-runs", self._place("runs"), *words)  # fmt: skip
        return json.loads(Path(self._place("runs")).read_text())

    def plan(self, step: str, *words: str) -> list[str]:
        """`plan` or `publish`. Returns what was written of slots, for `slots`."""
        names = [name for name, planner in self.PLANNERS.items() if planner == step]
        flags = [w for name in names for w in (f"--to-{name}", self._place(name))]
        self.do(step, *flags, *words)
        return names

    def slots(self, step: str) -> list[str]:
        """What a loop runs over."""
        return json.loads(Path(self._place(step)).read_text())

    def do(self, step: str, *words: str) -> None:
        """Any step but discover."""
        self._run(step, "--job", self.job, *words)

    def all_of(self, step: str, *words: str) -> None:
        """All slots of a step."""
        for slot in self.slots(step):
            self.do(step, "--slot", slot, *words)

    def until(self, step: str, *words: str) -> None:
        """Everything before a step, with flags of the planning steps."""
        self.discover()
        for name in ("plan", "extract", "publish", "train", "infer", "summarise", "report"):
            if name == step:
                return
            if name in self.PLANNERS:
                self.all_of(name)
            elif name != "report":
                self.plan(name, *words)
            else:
                self.do(name)

    def _run(self, name: str, *words: str) -> None:
        step.do(cli.parse(["step", name, *words]), Progress(quiet=True))

    def _place(self, name: str) -> str:
        return str(self._to / name)
