"""The training loop of one group: read a batch, step every bank on it, now and then save.

build the trainer → train → evaluate → publish → close
"""

import contextlib
import logging
import math
import time
import types
import typing as tp
from collections.abc import Iterator

import torch

from saev import names, storage
from saev.config import TrainConfig
from saev.config.source import ActivationSource
from saev.config.train import RUN
from saev.errors import CheckpointError, ConfigError
from saev.loaders import Batch, ShuffledLoader, batch_metrics
from saev.loaders.selection import Selection
from saev.nn import SparseAutoencoder, StepMetrics
from saev.nn.calibration import set_level
from saev.nn.ranks import Agreement
from saev.once import say_once
from saev.progress import Progress
from saev.shards import Shards, finite
from saev.train import evaluate, resume, sides
from saev.train.banks import build_banks, decided
from saev.train.curves import TENSORBOARD, Curves, WandbRun, of_run_folder
from saev.train.members import Member
from saev.train.schedule import lr_scale
from saev.train.signals import Interruption
from saev.train.team import Team
from saev.version import __version__

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
CONFIG = "config.json"

_FEW_ROWS = 256
"""With fewer rows per rank, a step is mostly waiting: for kernel launches and for other ranks."""
_FLUSH_SECONDS = 60.0
"""Time between writes of the curves."""


class Trainer:
    """Trains the SAEs of one group. Use as a context manager.

    If there are several ranks, each has a trainer, which works on its share of every batch. Only
    the trainer of rank 0 writes anything.

    Args:
        members: SAEs that share their batches, with resolved configs.
        points: the group's resume points.
        team: the ranks that train together, and the device of this one.
        point: the resume point; None starts from the beginning. Only rank 0 needs its tensors.

    Raises:
        ConfigError: the data or the device do not fit.
        CheckpointError: the resume point is of other runs.
    """

    def __init__(
        self,
        members: tp.Sequence[Member],
        points: resume.Points,
        team: Team,
        point: resume.ResumePoint | None = None,
    ):
        self.members = tuple(members)
        self.config: TrainConfig = members[0].config
        """The config of the first member, for settings that all members share."""
        self.step = 0
        """Steps done."""
        self._points = points
        self._done: set[int] = set()
        """Members that are published already."""
        self._ranks, self.device = team
        self._open = contextlib.ExitStack()
        try:
            self._build(point)
        except BaseException:
            self.close()
            raise

    def _build(self, point: resume.ResumePoint | None) -> None:
        data = self.config.train_data
        self._shards = self._open.enter_context(Shards.open(data.shards))
        selection = Selection(self._shards, data)
        self._n_examples = len(selection.examples)
        batch_size = decided(self.config.batch_size)
        self.batch_size = min(batch_size, selection.n_tokens)
        if self.batch_size < batch_size:
            say_once(
                logger,
                f"{data.shards} has {self.batch_size} tokens to train on, fewer than batch_size "
                f"{batch_size}: batches are smaller than asked for.",
            )
        if self._ranks.size > 1 and self.batch_size < _FEW_ROWS * self._ranks.size:
            logger.warning(
                "%d ranks share batches of %d tokens, about %d each. That is little work for a "
                "rank: fewer ranks (--n-ranks) may be as fast, or raise batch_size.",
                *(self._ranks.size, self.batch_size, self.batch_size // self._ranks.size),
            )
        self.n_steps = math.ceil(decided(self.config.n_train) / self.batch_size)
        self.loader = self._open.enter_context(
            # The few tokens at an epoch's end would make a noisy step at full learning rate.
            ShuffledLoader(
                self._shards,
                data,
                self.batch_size,
                seed=self.config.data_seed,
                drop_last=True,
                device=self.device,
                rank=self._ranks.rank,
                world_size=self._ranks.size,
            )
        )
        self.banks = build_banks(
            self.members,
            self._shards,
            self.device,
            initialise=point is None and self._ranks.first,
            ranks=self._ranks,
        )
        self._indices = [torch.tensor(part.indices, device=self.device) for part in self.banks]
        self._bad_example = torch.tensor(-1, device=self.device)
        self._bad_step = torch.full((len(self.members),), -1, device=self.device)
        if point is not None:
            self._restore(point)
        for part in self.banks:
            part.bank.begin_together()
        if self._ranks.first and point is not None:
            # If the group was killed while it published, some members are published already.
            self._done = {i for i, m in enumerate(self.members) if m.published}
        self.curves = self._start_curves(point) if self._ranks.first else []
        self._wandb = self._start_wandb()

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End reader threads and close files."""
        self._open.close()

    # --- Training --------------------------------------------------------------------------

    def train(self, progress: Progress) -> None:
        """Take the steps that are left and save the final state.

        After SIGTERM or Ctrl-C at any rank, all ranks finish their step, and rank 0 writes a resume
        point before it ends.

        Raises:
            ConfigError: a loss is not finite.
            SystemExit: status 143, after SIGTERM.
        """
        if self.step >= self.n_steps:
            return
        n = len(self.members)
        task = progress.task(
            "train" if n == 1 else f"train {n} SAEs",
            total=self.n_steps * self.batch_size, unit="tok", done=self.step * self.batch_size,
            is_main=True,
        )  # fmt: skip
        note, n_timed = "", 0
        agreement = Agreement(self._ranks)
        saved = flushed = timed = time.monotonic()
        with task as bar, Interruption() as interruption, _fast_matmul(self.device):
            for batch in self.loader:
                metrics = [
                    part.step(batch.act, self.step, self.n_steps, self.batch_size)
                    for part in self.banks
                ]
                self._watch(metrics, batch)
                self.step += 1
                last, now = self.step >= self.n_steps, time.monotonic()
                n_timed += self.batch_size
                stop = agreement.ask(interruption.requested)
                if self.step % self.config.log_every == 0 or last:
                    note = self._log(batch, metrics, n_timed / max(now - timed, 1e-9))
                    timed, n_timed = now, 0
                progress.safe_point()
                if last or stop or self._due(now - saved):
                    self.save()
                    saved = flushed = time.monotonic()
                elif now - flushed > _FLUSH_SECONDS:
                    self._flush()
                    flushed = now
                n_bytes = self.batch_size * self._shards.d_model * batch.act.element_size()
                bar.advance(self.batch_size, n_bytes=n_bytes, note=note)
                if last or stop:
                    stop = agreement.finish() or stop
                    break
            if stop or interruption.requested:
                interruption.leave()

    def _due(self, seconds: float) -> bool:
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        return bool((every and self.step % every == 0) or (minutes and seconds >= 60 * minutes))

    def _watch(self, metrics: tp.Sequence[StepMetrics], batch: Batch) -> None:
        """Record on the device the first step with a loss that is not finite, and the first example
        with an activation that is not. The host does not wait for the device."""
        for index, m in zip(self._indices, metrics, strict=True):
            old = self._bad_step[index]
            bad = ~(m.loss.isfinite() & m.grad_norm.isfinite()) & (old < 0)
            self._bad_step[index] = torch.where(bad, self.step + 1, old)
        # On a CPU, checking the whole batch takes up to 5% of a step, so it is checked only if a
        # loss is not finite: a loss contains the squares of all activations. On a GPU the batch is
        # always checked, because the host would have to wait for the losses.
        if self.device.type == "cpu" and int(self._bad_step.max()) < 0:
            return
        if len(batch.act):
            bad_rows = batch.act.isfinite().all(1).logical_not_()
            first = batch.example_idx.to(self.device)[bad_rows.int().argmax()]
            new = bad_rows.any() & (self._bad_example < 0)
            self._bad_example = torch.where(new, first, self._bad_example)

    def _check_finite(self) -> None:
        bad_steps = self._bad_step.tolist()
        if max(bad_steps) >= 0:  # the same on all ranks, because losses are sums over all of them
            found = [n for n in self._ranks.collect(int(self._bad_example)) if n >= 0]
            if found:
                raise finite.error(self._shards, found[0], int(self.config.train_data.layer or 0))
        for member, step in zip(self.members, bad_steps, strict=True):
            if step >= 0:
                c = member.config
                raise ConfigError(
                    f"Run {member.run_id}: the loss is not finite at step {step} of "
                    f"{self.n_steps}. Lower --lr (it is {c.lr:g}) or raise --n-lr-warmup (it is "
                    f"{c.n_lr_warmup}). The SAE: {c.sae.activation.kind}, {c.objective.kind}, "
                    f"d_sae {c.sae.d_sae}, seed {c.seed}."
                )

    # --- Curves ----------------------------------------------------------------------------

    def _log(self, batch: Batch, metrics: tp.Sequence[StepMetrics], tokens_per_s: float) -> str:
        """Add a row to every curve. Returns the text after the progress bar."""
        self._check_finite()
        batch = self._of_all_ranks(batch)
        if not self._ranks.first:
            return ""
        mixing = batch_metrics(
            batch, n_examples=self._n_examples, content_tokens=self._shards.content_tokens
        )
        timing = {"train/tokens_per_s": tokens_per_s, **self.loader.metrics()}
        done = {"step": self.step, "tokens": self.step * self.batch_size}
        rows: list[dict[str, float]] = []
        for part, m in zip(self.banks, metrics, strict=True):
            named = {**m._asdict(), "loss": m.loss}
            values = torch.stack([v.double() for v in named.values()]).cpu().T.tolist()
            for index, config, figures in zip(part.indices, part.configs, values, strict=True):
                got = dict(zip(named, figures, strict=True))
                factor = lr_scale(self.step - 1, self.n_steps, config.n_lr_warmup or 0)
                aims = config.objective.target_l0 is not None
                coefficient = {"train/sparsity_coeff": got["coeff"]} if aims else {}
                stored = self.curves[index].add(
                    {
                        **done,
                        "train/loss": got["loss"],
                        "train/mse": got["mse"],
                        "train/sparsity": got["sparsity"],
                        "train/aux": got["aux"],
                        "train/normalized_mse": got["nmse"],
                        "train/explained_variance": 1 - got["nmse"],
                        "train/l0": got["l0"],
                        "train/l1": got["l1"],
                        "train/n_dead": int(got["n_dead"]),
                        "train/grad_norm": got["grad_norm"],
                        "train/lr": (config.lr or 0.0) * factor,
                        **coefficient,
                        **mixing,
                    },
                    timing,
                )
                if self._wandb:
                    self._wandb[index].log({**timing, **stored})
                rows.append(got)
        return _note(rows)

    def _of_all_ranks(self, batch: Batch) -> Batch:
        """The batch with the example and token indices of all ranks."""
        if self._ranks.alone:
            return batch
        columns = torch.stack([batch.example_idx, batch.token_idx])
        lengths = [length for (length,) in self._ranks.counts([columns.shape[1]])]
        whole = torch.cat(self._ranks.gather(columns.T.contiguous(), lengths))
        return batch._replace(example_idx=whole[:, 0], token_idx=whole[:, 1])

    def _flush(self) -> None:
        for curve in self.curves:
            curve.flush()

    def _start_curves(self, point: resume.ResumePoint | None) -> list[Curves]:
        """The curves of each member, as they were at the resume point. Published curves stay."""
        curves = []
        for index, member in enumerate(self.members):
            rows = None
            if point is not None and point.curves is not None:
                rows = point.curves.get(member.run_id)
            elif point is not None:  # a point of version 0.1.0
                rows = of_run_folder(member.url, int(point.meta["n_rows"]))
            said = names.hyperparameters(member.config)
            keep = index in self._done
            curves.append(Curves(member.url, rows, keep=keep, hyperparameters=said))
        return curves

    def _start_wandb(self) -> list[WandbRun]:
        project = self.config.wandb_project
        if not project or not self._ranks.first:
            return []
        called = names.of([m.config for m in self.members])
        return [
            WandbRun(project, m.run_id, name, m.config.to_dict())
            for m, name in zip(self.members, called, strict=True)
        ]

    # --- State -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a resume point at the current step."""
        self._check_finite()
        if not self._ranks.first:
            return
        tensors = {
            f"bank{i}.{name}": tensor
            for i, part in enumerate(self.banks)
            for name, tensor in part.bank.state_dict().items()
        }
        meta = {
            "run_ids": [m.run_id for m in self.members],
            "rules": min(m.rules for m in self.members),
            "loader": self.loader.state_dict(),
        }
        curves = {m.run_id: c.so_far for m, c in zip(self.members, self.curves, strict=True)}
        self._points.save(resume.ResumePoint(self.step, tensors, meta, curves))
        self._flush()

    def _restore(self, point: resume.ResumePoint) -> None:
        """Take over the weights and counters of a resume point."""
        own, found = [m.run_id for m in self.members], point.meta["run_ids"]
        if found != own:
            raise CheckpointError(
                f"The resume point in {self._points.url} is of runs {', '.join(found)}, "
                f"expected {', '.join(own)}. Delete that folder to start from the beginning."
            )
        for i, part in enumerate(self.banks if self._ranks.first else ()):
            prefix = f"bank{i}."
            part.bank.load_state_dict(
                {k[len(prefix) :]: v for k, v in point.tensors.items() if k.startswith(prefix)}
            )
        self.loader.load_state_dict(point.meta["loader"])
        self.step = point.step
        logger.info("Continuing at step %d of %d.", self.step, self.n_steps)

    # --- Results ---------------------------------------------------------------------------

    def finish(self, progress: Progress) -> None:
        """Measure every SAE and publish its run folder; run.json is written last.

        Raises:
            StorageError: something cannot be written.
        """
        folded = dict(pair for part in self.banks for pair in part.saes())
        saes = [folded[index] for index in range(len(self.members))]
        measured = self._measure(saes, progress)
        if not self._ranks.first:
            return
        self._flush()
        places = sides.Places()
        _say_what_was_found(self.members, measured)
        for index, (member, sae, found) in enumerate(
            zip(self.members, saes, measured, strict=True)
        ):
            if index in self._done:
                if self._wandb:
                    self._wandb[index].finish(found["metrics"])
                continue
            progress.publish_point()
            if member.published:
                logger.warning("%s was published by another worker meanwhile.", member.url)
                continue
            for folder in ("", CHECKPOINT, TENSORBOARD):  # of writers that were killed
                storage.clean_temporary(storage.join(member.url, folder))
            evaluated = {"held_out": found["metrics"], "training": found.get("train_metrics", {})}
            self.curves[index].finish(self.n_steps, evaluated)
            saved = sae.save(storage.join(member.url, CHECKPOINT), self._provenance(member))
            config = storage.json_bytes(member.config.to_dict())
            storage.write_bytes(storage.join(member.url, CONFIG), config)
            listed = {CONFIG: storage.Listed.of(config), **self.curves[index].listed}
            listed |= {f"{CHECKPOINT}/{name}": row for name, row in saved.items()}
            record = {
                "run_id": member.run_id,
                "tag": member.config.tag,
                "saev": __version__,
                "rules": member.rules,
                **self._points.history(),
                "n_steps": self.n_steps,
                "n_tokens": self.n_steps * self.batch_size,
                **self._sources(member, places),
                **found,
            }
            progress.publish_point()
            storage.write_json(storage.join(member.url, RUN), storage.seal(record, listed))
            if self._wandb:
                self._wandb[index].finish(found["metrics"])

    def _measure(
        self, saes: tp.Sequence[SparseAutoencoder], progress: Progress
    ) -> list[evaluate.Evaluation]:
        """Calibrate and measure; every rank does some of the SAEs, each on all tokens."""
        rank, size = self._ranks.rank, self._ranks.size
        configs = [m.config for m in self.members[rank::size]]
        with _fast_matmul(self.device):
            mine = evaluate.evaluate(saes[rank::size], configs, self.device, progress)
        of_rank = self._ranks.collect(mine)
        measured = [of_rank[i % size][i // size] for i in range(len(saes))]
        for i, (sae, found) in enumerate(zip(saes, measured, strict=True)):
            if i % size != rank and "calibration" in found:
                set_level(sae, found["calibration"]["level"])
        return measured

    def _provenance(self, member: Member) -> dict[str, tp.Any]:
        """What the checkpoint itself says about its training, for users without the run folder."""
        return {
            "run_id": member.run_id,
            "n_tokens": self.n_steps * self.batch_size,
            **self._source(member).to_dict(),
        }

    def _source(self, member: Member) -> ActivationSource:
        data = member.config.train_data
        return self._shards.metadata.source(tp.cast(int, data.layer), data.tokens)

    def _sources(self, member: Member, places: sides.Places) -> dict[str, tp.Any]:
        """What the activations of both sides are, for run.json."""
        found = {"source": self._source(member).to_dict()}
        if not member.config.n_val:
            return found
        val = sides.sources(member.config, places)[1]
        other = sides.other_model(member.config, places)
        return {**found, "val_source": val.to_dict(), **({"other_model": other} if other else {})}


def _note(rows: tp.Sequence[tp.Mapping[str, float]]) -> str:
    """Text after the progress bar: each figure, from the lowest to the highest of all SAEs."""
    words = []
    for key, form in (("nmse", "NMSE {:.3f}"), ("l0", "L0 {:.0f}"), ("n_dead", "dead {:.0f}")):
        said = [form.format(end(row[key] for row in rows)) for end in (min, max)]
        least, most = said
        words.append(least if least == most else f"{least}–{most.partition(' ')[2]}")
    return ", ".join(words)


def _say_what_was_found(
    members: tp.Sequence[Member], measured: tp.Sequence[evaluate.Evaluation]
) -> None:
    """Log each SAE's L0 and its target, and warn if nothing is held out."""
    aims = [evaluate.aim(member.config) for member in members]
    for member, found, aim in zip(members, measured, aims, strict=True):
        if aim is not None and found["metrics"]:
            logger.info(
                "%s: L0 %.1f on held-out tokens, %.1f on training tokens; the target was %g.",
                *(member.run_id, found["metrics"]["l0"], found["train_metrics"]["l0"], aim),
            )
    if any(aim is not None and not m["metrics"] for aim, m in zip(aims, measured, strict=True)):
        logger.warning(
            "Nothing is held out, so thresholds stay as training left them: on other images, L0 "
            "is likely to be higher than asked for. Unless --n-val is 0, training keeps a share "
            "of the examples for that if there are enough images."
        )


@contextlib.contextmanager
def _fast_matmul(device: torch.device) -> Iterator[None]:
    """During training, multiply float32 matrices in TF32 on GPUs that can."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
