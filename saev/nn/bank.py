"""Many SAEs of one shape, trained at once on the same batches.

The parameters of the N members are stacked, [N, …]. The members share the reading and normalising
of a batch, and the optimiser step. The result of a member does not depend on the other members: on
CPU it is bit for bit the result of training it alone. For this, each member has its own encoder
product on CPU. One product over all members would be no faster there (benchmarks/training.py), and
rounds differently for small shapes. On a GPU, one wide product computes as many members as fit.

    bank = SaeBank(cfgs, objectives, lrs, seeds, d_model=384, data=sample)
    for batch in loader:
        metrics = bank.step((batch.act - mean) * scale, lr_factor=schedule(t))
    sae = bank.to_sae(0, mean, scale)
"""

import math
import typing as tp

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saev.config.sae import BatchTopK, JumpRelu, Matryoshka, Objective, SaeConfig, TopK
from saev.device import upload
from saev.errors import CheckpointError, ConfigError
from saev.limits import GPU_CHUNK_BYTES
from saev.nn.folding import fold_normalization
from saev.nn.group import DeadLatents, Group, GroupSums, group_gradients
from saev.nn.init import initial_weights
from saev.nn.kernels.choice import Kernels, Shape, use_triton
from saev.nn.kernels.errors import squared_norm, total
from saev.nn.objectives import draw_prefixes, n_prefixes, prefix_probabilities, variation
from saev.nn.optim import BETA1, BETA2, Adam, Muon, Optimizer
from saev.nn.ranks import ALONE, Ranks
from saev.nn.sae import SparseAutoencoder
from saev.nn.sparsity import Coefficient, SparsityControl, stacked
from saev.nn.weights import Weights

_CPU_CHUNK = 32 << 20
"""Like GPU_CHUNK_BYTES, for a CPU."""
_MIN_ROWS = 64
DEAD_FALL = 2.0
"""Decrease per step of ln θ of dead latents, as a multiple of its learning rate."""
_GPU_LOOK = 32
"""Steps between two updates of the candidates for dead latents, on a GPU."""


class StepMetrics(tp.NamedTuple):
    """Metrics of a step's batch before the update. One value per member, on the device."""

    mse: Float[Tensor, " n"]
    """Squared error per token and dimension, averaged over prefixes."""
    sparsity: Float[Tensor, " n"]
    """Sparsity term of the loss, with its coefficient. With a target L0 it is λ·L1 or λ·L0 with λ
    held constant in the gradient. λ, and so this term, is negative if L0 is below the target."""
    aux: Float[Tensor, " n"]
    """AuxK term of the loss, with its coefficient."""
    l0: Float[Tensor, " n"]
    """Mean number of active latents per token."""
    l1: Float[Tensor, " n"]
    """Mean sum of latents per token."""
    nmse: Float[Tensor, " n"]
    """Squared error of the whole dictionary divided by the variance of the batch; not finite if
    the variance is 0. Only for curves: reported metrics are computed over a whole split."""
    n_dead: Int[Tensor, " n"]
    """Latents that have not fired for `dead_after` tokens."""
    grad_norm: Float[Tensor, " n"]
    """Norm of the member's gradient."""
    coeff: Float[Tensor, " n"]
    """λ of this step, after warm-up or as chosen for a target L0."""

    @property
    def loss(self) -> Float[Tensor, " n"]:
        """The loss of each member."""
        return self.mse + self.sparsity + self.aux


class SaeBank:
    """N SAEs with the same width, number of latents and kind of activation.

    Args:
        cfgs: one per member; `top_k` and the like may differ.
        objectives: one per member.
        lrs: peak learning rate of each member.
        seeds: seed of each member's initialisation and prefixes.
        d_model: width of the activations.
        optim: optimiser.
        dead_after: tokens without firing after which a latent is dead.
        device: where parameters live.
        bf16: multiply with encoders (and dense decoders) in bfloat16. Weights keep their dtype.
            On a GPU only.
        data: [n, d_model] normalised activations for data-point initialisation.
        dtype: of parameters.
        ranks: processes that train the bank together, each on its share of every batch. All begin
            with the state of rank 0; see :meth:`begin_together`.
        kernels: see :func:`saev.nn.kernels.choice.use_triton`. Other dtypes than float32 never use
            Triton.

    Raises:
        ConfigError: members that cannot share a bank, or a setting that cannot be trained.
    """

    def __init__(
        self,
        cfgs: tp.Sequence[SaeConfig],
        objectives: tp.Sequence[Objective],
        lrs: tp.Sequence[float],
        seeds: tp.Sequence[int],
        d_model: int,
        optim: tp.Literal["adam", "muon"] = "adam",
        dead_after: int = 10_000_000,
        device: str | torch.device = "cpu",
        bf16: bool = False,
        data: Float[Tensor, "sample d_model"] | None = None,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
        kernels: Kernels = "auto",
    ):
        self.ranks = ranks
        self.cfgs = [cfg.resolved(d_model) for cfg in cfgs]
        self.objectives = list(objectives)
        self.lrs = [float(lr) for lr in lrs]
        self.d_model = d_model
        self.d_sae = _check_members(self.cfgs, self.objectives, self.lrs, seeds)
        self.dead_after = dead_after
        self.device = torch.device(device)
        self.bf16 = bf16 and self.device.type == "cuda"
        self.kind = self.cfgs[0].activation.kind
        self.triton = dtype == torch.float32 and use_triton(
            kernels, self.device, self._shape(), ranks
        )
        self.t = 0
        self.n_tokens = 0

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        first = [
            initial_weights(cfg, data, generator, objective.target_l0)
            for cfg, generator, objective in zip(
                self.cfgs, self._generators, self.objectives, strict=True
            )
        ]
        names = [n for n in Weights._fields if n != "log_threshold" or self.kind == "jump-relu"]
        self.params = {
            name: torch.stack([getattr(w, name) for w in first]).to(self.device, dtype)
            for name in names
        }
        self.grads = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.optimizer: Optimizer = (Adam if optim == "adam" else Muon)(self.params)
        self._rates = [
            {"": lr, "log_threshold": _threshold_lr(cfg, lr, optim)}
            for cfg, lr in zip(self.cfgs, self.lrs, strict=True)
        ]
        n = len(self.cfgs)
        self.threshold = torch.zeros(n, dtype=dtype, device=self.device)
        self.sparsity = SparsityControl(self.kind, self.objectives, self.threshold)
        self.since_fired = torch.zeros(n, self.d_sae, dtype=torch.int64, device=self.device)
        self._steps_between_looks = _GPU_LOOK if self.device.type == "cuda" else 1
        self._looked_until = -1
        self._candidates: list[Tensor] = []
        self._probabilities = {
            o.pareto_alpha: prefix_probabilities(self.d_sae, o.pareto_alpha)
            for o in self.objectives
            if isinstance(o, Matryoshka)
        }

    def __len__(self) -> int:
        return len(self.cfgs)

    def _shape(self) -> Shape:
        """What kernels are checked with."""
        sparse = [
            c.activation.top_k for c in self.cfgs if isinstance(c.activation, TopK | BatchTopK)
        ]
        n_p = max(n_prefixes(o, self.d_sae) for o in self.objectives)
        return Shape(self.d_model, self.d_sae, max(sparse, default=1), n_p, self.bf16)

    # --- Training --------------------------------------------------------------------------

    def step(
        self,
        x: Float[Tensor, "batch d_model"],
        lr_factor: float | tp.Sequence[float] = 1.0,
        sparsity_factor: float | tp.Sequence[float] = 1.0,
        n_tokens: int | None = None,
    ) -> StepMetrics:
        """Take one optimiser step for every member.

        Args:
            x: normalised activations. With several ranks, the share of this rank, which may be
                empty.
            lr_factor: factor of the schedule on the peak learning rates, one for all members or one
                for each.
            sparsity_factor: the same for fixed sparsity coefficients.
            n_tokens: tokens of the batch over all ranks; by default the tokens of x.

        Raises:
            ConfigError: the width of x, or the length of a sequence, is wrong.
        """
        metrics = self.compute_gradients(x, sparsity_factor, n_tokens)
        self.apply_gradients(lr_factor)
        return metrics

    @torch.no_grad()
    def compute_gradients(
        self,
        x: Float[Tensor, "batch d_model"],
        sparsity_factor: float | tp.Sequence[float] = 1.0,
        n_tokens: int | None = None,
    ) -> StepMetrics:
        """First half of :meth:`step`: compute `grads`, count firing latents, update thresholds."""
        n_tokens = n_tokens or x.shape[0]
        if x.ndim != 2 or x.shape[1] != self.d_model or not n_tokens:
            raise ConfigError(
                f"The batch has shape {list(x.shape)}, expected [tokens, {self.d_model}]."
            )
        x = x.to(self.device, self.threshold.dtype).contiguous()
        factors = self._per_member(sparsity_factor, "sparsity_factor")
        for grad in self.grads.values():
            grad.zero_()
        variance = variation(x, self.ranks, n_tokens)
        per_dim = variance / (n_tokens * self.d_model)
        coeffs = self.sparsity.coefficients(factors, per_dim)
        dead = self._dead(n_tokens)

        results = []
        # The groups have to be the same on all ranks, although their shares differ by some rows.
        n_group = self._group_size(-(-n_tokens // self.ranks.size))
        for first in range(0, len(self), n_group):
            members = range(first, min(first + n_group, len(self)))
            group = self._group(members, x.shape[0], n_tokens, coeffs)
            dead_g = None if dead is None else dead.of(slice(members[0], members[-1] + 1))
            results.append(group_gradients(group, x, dead_g, per_dim))
        sums = GroupSums(*(torch.cat(parts) for parts in zip(*results, strict=True)))
        self.ranks.add_(*self.grads.values(), *sums)

        self.n_tokens += n_tokens
        self.since_fired.add_(n_tokens).masked_fill_(sums.n_active > 0, 0)
        grad_norm = self._gradient_norm(self._remove_parallel())
        l0, l1 = sums.l0 / n_tokens, sums.l1 / n_tokens
        self.sparsity.observe(l0)
        penalty = {"relu": l1, "jump-relu": l0}.get(self.kind, torch.zeros_like(l0))
        coeff = stacked(coeffs, x)
        return StepMetrics(
            mse=sums.mse / (n_tokens * self.d_model),
            sparsity=penalty * coeff,
            coeff=coeff,
            aux=sums.aux,
            l0=l0,
            l1=l1,
            nmse=sums.error / variance,
            n_dead=(self.since_fired >= self.dead_after).sum(-1),
            grad_norm=grad_norm,
        )

    @torch.no_grad()
    def apply_gradients(self, lr_factor: float | tp.Sequence[float] = 1.0) -> None:
        """Second half of :meth:`step`: update parameters, lower thresholds of dead latents, and
        normalise decoders."""
        factors = self._per_member(lr_factor, "lr_factor")
        self.t += 1
        rates = [
            {name: rate * factor for name, rate in own.items()}
            for own, factor in zip(self._rates, factors, strict=True)
        ]
        if self.triton and isinstance(self.optimizer, Adam):
            self.optimizer.step(self.grads, rates, self.t, skip=("W_dec",))
            self._update_decoders(rates)
        else:
            self.optimizer.step(self.grads, rates, self.t)
            self._normalise_decoders()
        self._lower_dead_thresholds(rates)

    def _normalise_decoders(self) -> None:
        w_dec = self.params["W_dec"]
        for n, cfg in enumerate(self.cfgs):
            if cfg.normalize_w_dec:
                norm = torch.linalg.vector_norm(w_dec[n], dim=-1, keepdim=True)
                w_dec[n].div_(norm.clamp(min=1e-12))

    def _update_decoders(self, rates: tp.Sequence[tp.Mapping[str, float]]) -> None:
        """Adam's step and the norm of the rows, by Triton's kernel."""
        from saev.nn.kernels.triton import upkeep

        size, root = 1 - BETA1**self.t, math.sqrt(1 - BETA2**self.t)
        of_members = [
            [own[""] / size, root, float(cfg.normalize_w_dec)]
            for own, cfg in zip(rates, self.cfgs, strict=True)
        ]
        m, v = (self.optimizer.state[f"adam.W_dec.{moment}"] for moment in ("m", "v"))
        w_dec, grad = self.params["W_dec"], self.grads["W_dec"]
        upkeep.update(w_dec, grad, m, v, upload(of_members, w_dec))

    def _lower_dead_thresholds(self, rates: tp.Sequence[tp.Mapping[str, float]]) -> None:
        """Lower ln θ of dead latents until they fire again, down to 1 below the mean of ln θ of
        live latents (θ is then about a third of theirs).

        The pre-activations of a dead latent are far from its θ. So the gradient of θ is zero, and
        AuxK changes only the weights.
        """
        if "log_threshold" not in self.params:
            return
        dead = self.since_fired >= self.dead_after
        for n, own in enumerate(rates):
            log_theta, live = self.params["log_threshold"][n], ~dead[n]
            usual = total(log_theta * live) / live.sum()  # NaN if all are dead: then nothing falls
            floor = torch.minimum(log_theta, (usual - 1).nan_to_num(torch.inf))
            fallen = torch.maximum(log_theta - DEAD_FALL * own["log_threshold"], floor)
            log_theta.copy_(torch.where(live, log_theta, fallen))

    def _dead(self, n_tokens: int) -> DeadLatents | None:
        """The dead latents, and candidates that include all of them.

        On a GPU the candidates are computed only every 32 steps, because this waits for the device.
        They include every latent that may become dead before the next time.
        """
        if self.n_tokens + (self._steps_between_looks - 1) * n_tokens < self.dead_after:
            return None  # no latent can be dead before the next update of the candidates
        if self.n_tokens > self._looked_until:
            ahead = (self._steps_between_looks - 1) * n_tokens
            self._looked_until = self.n_tokens + ahead
            soon = self.since_fired >= self.dead_after - ahead
            self._candidates = [row.nonzero().squeeze(1) for row in soon]
        return DeadLatents(self.since_fired >= self.dead_after, self._candidates)

    def _group(
        self, members: range, n_rows: int, n_tokens: int, coeffs: list[Coefficient]
    ) -> Group:
        prefixes = draw_prefixes(
            [self.objectives[n] for n in members],
            [self._generators[n] for n in members],
            self._probabilities,
            self.d_sae,
        )
        some = slice(members[0], members[-1] + 1)
        return Group(
            activations=[cfg.activation for cfg in self.cfgs[some]],
            objectives=self.objectives[some],
            coeffs=coeffs[some],
            weights=Weights(**{name: p[some] for name, p in self.params.items()}),
            grads=Weights(**{name: g[some] for name, g in self.grads.items()}),
            threshold=self.threshold[some],
            prefixes=prefixes.to(self.threshold),
            chunk=self._chunk(n_rows, prefixes.lengths.shape[1], len(members)),
            bf16=self.bf16,
            n_tokens=n_tokens,
            ranks=self.ranks,
            triton=self.triton,
        )

    def _row_bytes(self, n_p: int) -> int:
        return 4 * max(self.d_sae, n_p * self.d_model)

    def _group_size(self, n_rows: int) -> int:
        """Members that share one encoder product."""
        if self.device.type != "cuda" or self.kind not in ("top-k", "batch-top-k"):
            return 1
        n_p = max(n_prefixes(o, self.d_sae) for o in self.objectives)
        return max(1, GPU_CHUNK_BYTES // (self._row_bytes(n_p) * n_rows))

    def _chunk(self, n_rows: int, n_p: int, n_members: int) -> int:
        """Rows per chunk. It depends on the member and the batch only, because the rounding of the
        results depends on it."""
        if n_members > 1:
            return max(1, n_rows)
        budget = GPU_CHUNK_BYTES if self.device.type == "cuda" else _CPU_CHUNK
        most = max(_MIN_ROWS, budget // self._row_bytes(n_p))
        n_chunks = max(1, -(-n_rows // most))
        return max(1, -(-n_rows // n_chunks))  # all of about one length

    def _remove_parallel(self) -> dict[str, Tensor]:
        """Remove the part of decoder gradients that is parallel to the rows. Normalising the rows
        would undo it. Returns squared norms of rows of gradients, if they are known by the way."""
        if self.triton:
            from saev.nn.kernels.triton import upkeep

            removing = upload([float(c.remove_parallel_grads) for c in self.cfgs], self.threshold)
            w_dec, grad = self.params["W_dec"], self.grads["W_dec"]
            return {"W_dec": upkeep.remove_parallel(w_dec, grad, removing)}
        for n, cfg in enumerate(self.cfgs):
            if cfg.remove_parallel_grads:
                w, grad = self.params["W_dec"][n], self.grads["W_dec"][n]
                along = torch.linalg.vecdot(grad, w)
                along /= torch.linalg.vecdot(w, w).clamp(min=1e-24)
                grad.addcmul_(along[:, None], w, value=-1)
        return {}

    def _gradient_norm(self, known: tp.Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        # One member at a time: torch may add a row of [n, d_sae] in another order than [1, d_sae].
        norms = []
        for n in range(len(self)):
            square = torch.zeros((), dtype=self.threshold.dtype, device=self.device)
            for name, grad in self.grads.items():
                g = grad[n]
                if name in known:
                    rows = known[name][n]
                else:
                    rows = squared_norm(g) if g.ndim == 2 else g.square()
                square = square + total(rows)
            norms.append(square.sqrt())
        return torch.stack(norms)

    def _per_member(self, value: float | tp.Sequence[float], name: str) -> list[float]:
        values = [value] * len(self) if isinstance(value, int | float) else list(value)
        if len(values) != len(self):
            raise ConfigError(f"{name} has {len(values)} values, the bank has {len(self)} members.")
        return values

    # --- Members ---------------------------------------------------------------------------

    def members(self) -> list[SparseAutoencoder]:
        """Copies of all members, as SAEs on normalised activations."""
        return [self._member(n) for n in range(len(self))]

    def to_sae(self, n: int, mean: Tensor | None = None, scale: float = 1.0) -> SparseAutoencoder:
        """A copy of member n, as an SAE on recorded activations x. The bank was trained on
        (x - mean)·scale."""
        return fold_normalization(self._member(n), mean, scale)

    def _member(self, n: int) -> SparseAutoencoder:
        tensors = {name: p[n] for name, p in self.params.items() if name != "log_threshold"}
        tensors["W_enc"] = tensors["W_enc"].T
        if self.kind == "batch-top-k":
            tensors["threshold"] = self.threshold[n]
        if self.kind == "jump-relu":
            tensors["threshold"] = self.params["log_threshold"][n].clone().exp()
        return SparseAutoencoder.from_tensors(self.cfgs[n], tensors).to(self.device)

    # --- Resume, and other ranks -----------------------------------------------------------

    @torch.no_grad()
    def begin_together(self) -> None:
        """Copy the state of rank 0 to all ranks."""
        rng = torch.stack([g.get_state() for g in self._generators])
        counters = torch.tensor([self.t, self.n_tokens])
        self.ranks.broadcast_(*self._tensors().values(), rng, counters)
        self._set_counters(rng, counters)

    def _set_counters(self, rng: Tensor, counters: Tensor) -> None:
        for generator, state in zip(self._generators, rng, strict=True):
            generator.set_state(state.clone())
        self.t, self.n_tokens = (int(v) for v in counters)
        self._looked_until = -1

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **self.params,
            **self.optimizer.state,
            "threshold": self.threshold,
            "since_fired": self.since_fired,
            **self.sparsity.state,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the whole training state as tensors on the CPU, for safetensors."""
        state = {name: t.detach().cpu().clone() for name, t in self._tensors().items()}
        state["rng"] = torch.stack([g.get_state() for g in self._generators])
        state["counters"] = torch.tensor([self.t, self.n_tokens])
        return state

    @torch.no_grad()
    def load_state_dict(self, state: tp.Mapping[str, Tensor]) -> None:
        """Continue exactly where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: the state is of another bank.
        """
        own = self.state_dict()
        if set(own) != set(state):
            different = sorted(set(own) ^ set(state))
            raise CheckpointError(
                "The resume state is of another kind of bank: only one of the two has "
                f"{different}. Start the run again from the beginning."
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                raise CheckpointError(
                    f"The resume state's {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{own[name].dtype} {list(own[name].shape)}. It is of another run."
                )
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self._set_counters(state["rng"], state["counters"])


def _threshold_lr(cfg: SaeConfig, lr: float, optim: str) -> float:
    """Peak learning rate of ln θ."""
    chosen = cfg.activation.threshold_lr if isinstance(cfg.activation, JumpRelu) else None
    return chosen or lr * {"adam": 5.0, "muon": 1.0}[optim]  # Muon's rates are five times Adam's


def _check_members(
    cfgs: tp.Sequence[SaeConfig],
    objectives: tp.Sequence[Objective],
    lrs: tp.Sequence[float],
    seeds: tp.Sequence[int],
) -> int:
    """Check that the members can share a bank. Returns d_sae."""
    lengths = [len(cfgs), len(objectives), len(lrs), len(seeds)]
    if not cfgs or len(set(lengths)) != 1:
        raise ConfigError(
            f"A bank needs as many configs as objectives, rates and seeds, got {lengths}."
        )
    shapes = {(cfg.d_sae, cfg.activation.kind) for cfg in cfgs}
    if len(shapes) != 1:
        raise ConfigError(
            f"SAEs of one bank share d_sae and the activation, got {sorted(map(str, shapes))}. "
            "Make a bank for each."
        )
    for cfg, objective in zip(cfgs, objectives, strict=True):
        if isinstance(cfg.activation, TopK) and not cfg.activation.rectify:
            raise ConfigError("A TopK that keeps negative values (rectify false) is not trainable.")
        assert cfg.d_sae is not None
        n_prefixes(objective, cfg.d_sae)
    assert cfgs[0].d_sae is not None
    return cfgs[0].d_sae
