"""The product's own pipeline on small generated images: a tiny ViT with random weights, on CPUs."""

import collections.abc
import json
import re
import tempfile
import typing as tp
from pathlib import Path

from conformance.cluster import Cluster, with_settings
from conformance.table import Check, Failed, NotRun
from pipelines import budget, logs, runs, steps

RUN_SECONDS = 1500.0
N_PICTURES = 24
_TOLERATED = 1.1
"""How much larger than reckoned a run may be: pods that were retried are nodes of their own."""

CONFIG = """
[shards]
family = "timm"
ckpt = "test_vit/random"
image_size = 64
layers = [-1]
max_tokens_per_shard = 204   # twelve images: two shards, so two parts

[train]
n_train = 4000
max_parallel = 1             # two SAEs in two groups
{train}

[train.sae]
d_sae = 64

[train.train_data]
val_fraction = 0.25

[sweep.sae.activation]
top_k = [2, 4]

[visuals]
n_latents = 1
"""
LONG = """
batch_size = 256
checkpoint_every = 1000
checkpoint_minutes = 0
"""


class Point(tp.NamedTuple):
    """A resume point."""

    step: int
    group: str
    """Name of the group of SAEs that trains."""


class _Canceled(tp.NamedTuple):
    """A run that was canceled while it trained."""

    before: set[Point]
    """Its resume points when it was canceled."""
    after: set[Point]
    """The same when it was over."""
    run_id: str


class Jobs:
    """Runs that share a dataset.

    Args:
        cluster: where.
        name: of the dataset, and of the runs.
    """

    def __init__(self, cluster: Cluster, name: str = "job"):
        self.cluster, self.name = cluster, name
        self.dataset = cluster.data(name)
        self._folder = tempfile.TemporaryDirectory(prefix="saev-conformance-")
        self.first = ""
        """Id of the run that did it all."""

    def config(self, name: str = "run", train: str = "", text: str = CONFIG) -> str:
        """Path of a config file."""
        path = Path(self._folder.name, f"{name}.toml")
        path.write_text(text.replace("{train}", train), encoding="utf-8")
        return str(path)

    # --- The whole of it -------------------------------------------------------------------------

    def whole(self) -> str:
        """From pictures to pages."""
        self.cluster.storage(self.dataset, "pictures", "0", str(N_PICTURES))
        self.first = self.cluster.submit(self.name, self.dataset, self.config())
        run = self.cluster.succeed(self.first, RUN_SECONDS)
        n, n_working = len(self.cluster.pods(self.first)), len(working(self.cluster, self.first))
        return (
            f"{seconds(run)} for {n} pods, of which {n_working} compute; "
            f"{self.cluster.workflow(self.first) or 'Workflow not readable'}"
        )

    def size(self) -> str:
        """Whether the run's object is as large as `make submit` reckons: KFP's part may grow."""
        self.needs_first()
        found = self.cluster.workflow(self.first)
        if found is None:
            raise NotRun("you may not read Workflows, or Argo has deleted this one")
        job = self.cluster.job("saev", self.dataset, self.config())
        reckoned = budget.n_bytes(job.compiled, job.parameters)
        text = (
            f"{found.n_bytes / 1000:.0f} kB in {found.n_nodes} nodes, reckoned "
            f"{reckoned / 1000:.0f} kB"
        )
        if not job.compiled.is_launched:
            most = budget.most_parts(job.compiled, job.parameters)
            text += f"; n_parts = {most} stays below {budget.MOST // 1000} kB"
        if found.n_bytes > _TOLERATED * reckoned:
            raise Failed(text, "Use a smaller n_parts on this cluster, and report it.")
        return text

    def results(self) -> str:
        """What it left: metrics, pages, the record; and that the API knows its steps."""
        cluster = self.cluster
        self.needs_first()
        keys = cluster.keys("out")
        wanted = {
            "shards": r"shards/[^/]+/shards\.json",
            "runs": r"runs/[^/]+/run\.json",
            "overview": r"index\.html",
            "record": rf"datasets/runs/{self.first}\.json",
            "processed": r"datasets/[^/]+/processed/[^/]+\.json",
        }
        found = {name: [k for k in keys if re.fullmatch(p, k)] for name, p in wanted.items()}
        counts = {name: len(keys) for name, keys in found.items()}
        if counts != {"shards": 1, "runs": 2, "overview": 1, "record": 1, "processed": 1}:
            raise Failed(f"the storage root holds {counts}")
        page = cluster.storage(cluster.at("out", "index.html"), "read")
        names = [key.split("/")[1] for key in found["runs"]]
        missing = [name for name in names if name not in page]
        if missing:
            raise Failed(f"the overview does not name {', '.join(missing)}")
        shown = {step.name: step.state for step in steps.of_run(cluster.run(self.first))}
        wrong = [name for name in steps.STEPS if shown.get(name) != "done"]
        if wrong:
            raise Failed(
                f"the run succeeded, and the API shows no end of {', '.join(wrong)}; "
                f"{cluster.workflow(self.first) or 'Workflow not readable'}"
            )
        books = sum(key.endswith(".html") for key in keys) - 1
        return f"2 SAEs, {books} pages of latents, overview; the API shows all {len(shown)} steps"

    def again(self) -> str:
        """Submitted once more, nothing is computed."""
        self.needs_first()
        return self._without_work(self.cluster, "again")

    def upgraded(self) -> str:
        """A changed pipeline is a new version, and what the old one made is found."""
        self.needs_first()
        compiled = {**self.cluster.settings.compile, "parallelism": 3, "retries": 2}
        return self._without_work(with_settings(self.cluster, compile=compiled), "upgraded")

    def _without_work(self, cluster: Cluster, name: str) -> str:
        run_id = cluster.submit(f"{self.name}-{name}", self.dataset, self.config())
        run = cluster.succeed(run_id, RUN_SECONDS)
        pods = working(cluster, run_id)
        if pods:
            raise Failed(f"{len(pods)} pods of steps that compute: {', '.join(_steps(pods))}")
        return f"no pod that computes; {seconds(run)}, {len(cluster.pods(run_id))} pods"

    # --- Stopped in the middle -------------------------------------------------------------------

    def canceled(self) -> str:
        """Training writes where it is, the claim is given back."""
        self.needs_first()
        return self.cancel("cancel")[0]

    def resumed(self) -> str:
        """Submitted again after a cancel, each group goes on where it was."""
        self.needs_first()
        newest = {point.group: point.step for point in sorted(self.points())}
        run_id = self._cancel_training("resume").run_id
        said = self.cluster.logs(run_id, "train")
        found = {int(step) for step in re.findall(r"Continuing at step (\d+)", said)}
        if not found or not found <= set(newest.values()):
            raise Failed(f"it continued at {found or 'no step'}; expected {set(newest.values())}")
        return f"continued at step {' and '.join(map(str, sorted(found)))}"

    def cancel(self, name: str) -> tuple[str, str]:
        """Cancel a run while it trains. Returns what was found, and the run's id."""
        cluster = self.cluster
        before, after, run_id = self._cancel_training(name)
        if not after - before:
            raise Failed(
                "no resume point was written when it was stopped; the newest was "
                f"{max(before).step}",
                "See whether the log of the step's container `wait` names kill-cmd-main.",
            )
        place = cluster.at("out/datasets/runs", f"{run_id}.json")
        if "finished" not in cluster.storage(place, "read"):
            raise Failed("the exit handler wrote no record, so the dataset stays claimed")
        held = self._held(run_id)
        if held:
            raise Failed(f"the claim {held[0]} is still held")
        last = cluster.last_word(run_id)
        found = f"resume point at step {max(after).step}, claim given back; the log ends: {last}"
        return found, run_id

    def _cancel_training(self, name: str) -> "_Canceled":
        """Cancel a run after its first new resume point."""
        cluster = self.cluster
        config = self.config("long", LONG, CONFIG.replace("4000", "400_000_000"))
        known = self.points()
        run_id = cluster.submit(f"{self.name}-{name}", self.dataset, config)

        def look() -> set[Point] | None:
            run = cluster.run(run_id)
            if run.state in steps.OVER:
                raise Failed(f"the run was over before it trained: {cluster.last_word(run_id)}")
            if not cluster.pods(run_id, "train"):
                return None
            return self.points() - known or None

        before = cluster.until(RUN_SECONDS, "training wrote no resume point", look)
        runs.cancel(cluster.kfp, cluster.run(run_id))
        cluster.end(run_id, 300)
        return _Canceled(before, self.points() - known, run_id)

    def points(self) -> set[Point]:
        """The resume points that are on storage."""
        keys = self.cluster.keys("out")
        found = (re.search(r"resume/([^/]+)/step-(\d+)\.json$", key) for key in keys)
        return {Point(int(match[2]), match[1]) for match in found if match}

    def _held(self, run_id: str) -> list[str]:
        """Newest claims that the run holds."""
        newest: dict[str, str] = {}
        for key in sorted(key for key in self.cluster.keys("out") if "/claims/" in key):
            newest[key.rpartition("/")[0]] = key
        texts = {
            key: self.cluster.storage(self.cluster.at("out", key), "read")
            for key in newest.values()
        }
        return [
            key for key, text in texts.items()
            if run_id in text and not json.loads(text).get("released", False)
        ]  # fmt: skip

    def needs_first(self) -> None:
        """Raise NotRun where the check that records has not succeeded."""
        if not self.first:
            raise NotRun("it needs the check `job: images to pages`")

    # --- Afterwards ------------------------------------------------------------------------------

    def collected(self) -> str:
        """`saev gc` deletes what unfinished work left, and nothing else."""
        cluster = self.cluster
        self.needs_first()
        before = set(cluster.keys("out"))
        command = ("python", "-m", "saev", "gc", "--root", cluster.root)
        cluster.pod([*command, "--grace", "0m", "--delete", "--yes"], "saev gc")
        gone = before - set(cluster.keys("out"))
        wrong = [key for key in gone if re.search(r"/(run|shards)\.json$|index\.html$", key)]
        if wrong:
            raise Failed(f"it deleted {', '.join(sorted(wrong))}")
        if any("/resume/" in key for key in before) and not any("/resume/" in k for k in gone):
            raise Failed("the resume points of canceled training are still there")
        return f"{len(gone)} objects of unfinished work, none of what is complete"


def checks(jobs: Jobs, *, quick: bool) -> list[Check]:
    """In their order, each after the one before."""
    found = [
        Check("job: images to pages", jobs.whole),
        Check("job: size of the run's object", jobs.size),
        Check("job: its results", jobs.results),
        Check("job: submitted again", jobs.again),
        Check("job: canceled in training", jobs.canceled),
    ]
    if not quick:
        found += [
            Check("job: continued", jobs.resumed),
            Check("upgrade: a changed pipeline", jobs.upgraded),
        ]
    return found


def seconds(run: tp.Any) -> str:
    """How long a run took."""
    return steps.duration(steps.real_time(run.created_at), steps.real_time(run.finished_at))


def working(cluster: Cluster, run_id: str) -> list[tp.Any]:
    """Pods of the steps that would have a GPU: those with shared memory for it."""
    return [
        pod for pod in cluster.pods(run_id)
        if any(mount.mount_path == "/dev/shm"
               for container in pod.spec.containers if container.name == logs.MAIN
               for mount in container.volume_mounts or [])
    ]  # fmt: skip


def _steps(pods: collections.abc.Iterable[tp.Any]) -> list[str]:
    return sorted({pod.metadata.labels[logs.STEP_LABEL] for pod in pods})
