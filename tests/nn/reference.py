"""A training step as its equations state it: float64, dense matrices, autograd, one SAE.

Typed from docs/training.md and the papers. Of saev it uses configs and nothing else, so that a
mistake in saev.nn is not made twice. It starts from the state of a bank's member:

    reference = Reference(bank, n)
    want = reference.step(x)  # what bank.step(x) should measure of member n
"""

import math
import typing as tp

import torch

from saev.config import Objective, SaeConfig

BETA1, BETA2, EPS = 0.9, 0.999, 6.25e-10
PARAMS = ("W_enc", "b_enc", "W_dec", "b_dec", "log_threshold")


class Measured(tp.NamedTuple):
    """The fields of StepMetrics."""

    mse: float
    sparsity: float
    aux: float
    l0: float
    l1: float
    nmse: float
    n_dead: float
    grad_norm: float
    coeff: float


class Reference:
    """One member of a bank. Its state is public and may be changed between steps.

    Attributes:
        params: W_enc [d_sae, d_model] and the others, float64.
        grads: of the last step.
        margin: how far the last step was from a choice that rounding could change: the least
            distance of a pre-activation from being (un)selected.
    """

    def __init__(self, bank: tp.Any, n: int):
        self.cfg: SaeConfig = bank.cfgs[n]
        self.objective: Objective = bank.objectives[n]
        self.lr: float = bank.lrs[n]
        self.dead_after: int = bank.dead_after
        state = bank.state_dict()
        self.params = {name: state[name][n].double() for name in PARAMS if name in state}
        self.moments = {k: v[n].double() for k, v in state.items() if k[:5] in ("adam.", "muon.")}
        self.threshold = float(state["threshold"][n])
        self.since_fired = state["since_fired"][n].clone()
        names = {"error": "sparsity.error", "sum": "sparsity.sum"}
        self.control = {k: float(state[v][n]) for k, v in names.items() if v in state}
        self.t = int(state["counters"][0])
        self.grads: dict[str, torch.Tensor] = {}
        self.margin = math.inf
        self._generator = torch.Generator()
        self._generator.set_state(state["rng"][n].clone())

    # --- One step --------------------------------------------------------------------------

    def step(
        self, x: torch.Tensor, lr_factor: float = 1.0, sparsity_factor: float = 1.0
    ) -> Measured:
        measured = self.gradients(x, sparsity_factor)
        self.update(lr_factor)
        return measured

    def gradients(self, x: torch.Tensor, sparsity_factor: float = 1.0) -> Measured:
        x = x.double()
        n_tokens = x.shape[0]
        self.margin = math.inf
        for p in self.params.values():
            p.requires_grad_()
        w_dec, b_dec = self.params["W_dec"], self.params["b_dec"]
        z = x @ self.params["W_enc"].T + self.params["b_enc"]
        f, penalty = self._activate(z)
        prefixes = self.draw_prefixes()
        x_hats = [f[:, :length] @ w_dec[:length] + b_dec for length in prefixes]
        mse = sum((x - x_hat).square().mean() for x_hat in x_hats) / len(prefixes)
        coeff = self._coefficient(sparsity_factor, (x - x.mean(0)).square().mean().item())
        sparsity = coeff * penalty / n_tokens
        aux = self._aux(x, z, x_hats[-1])
        (mse + sparsity + aux).backward()
        self.grads = {name: p.grad for name, p in self.params.items()}
        self.params = {name: p.detach() for name, p in self.params.items()}

        fires = f.detach() > 0
        self._observe(fires.sum().item() / n_tokens)
        self.since_fired = torch.where(fires.any(0), 0, self.since_fired + n_tokens)
        if self.cfg.remove_parallel_grads:
            w, g = self.params["W_dec"], self.grads["W_dec"]
            length = w.norm(dim=1, keepdim=True).clamp(min=1e-300)
            self.grads["W_dec"] = g - (g * w / length).sum(1, keepdim=True) * w / length
        spread, error = (x - x.mean(0)).square().sum(), (x - x_hats[-1]).square().sum()
        return Measured(
            mse=mse.item(),
            sparsity=sparsity.item(),
            aux=aux.item(),
            l0=fires.sum().item() / n_tokens,
            l1=f.sum().item() / n_tokens,
            nmse=(error / spread).item(),
            n_dead=(self.since_fired >= self.dead_after).sum().item(),
            grad_norm=math.sqrt(sum(g.square().sum().item() for g in self.grads.values())),
            coeff=coeff,
        )

    def update(self, lr_factor: float = 1.0) -> None:
        self.t += 1
        for name, p in self.params.items():
            rule = self._muon if f"muon.{name}.m" in self.moments else self._adam
            lr = self._threshold_lr() if name == "log_threshold" else self.lr
            p -= lr * lr_factor * rule(name, self.grads[name])
            if name == "log_threshold":
                self._lower(p, 2 * lr * lr_factor)
        if self.cfg.normalize_w_dec:
            self.params["W_dec"] /= self.params["W_dec"].norm(dim=1, keepdim=True).clamp(min=1e-12)

    def draw_prefixes(self) -> list[int]:
        """P(length = l) ∝ l^-α - (l+1)^-α for l < d_sae, without repetition, and d_sae."""
        d_sae = self.params["W_dec"].shape[0]
        n = getattr(self.objective, "n_prefixes", 1)
        if n == 1:
            return [d_sae]
        alpha = self.objective.pareto_alpha
        chances = [i**-alpha - (i + 1) ** -alpha for i in range(1, d_sae)]
        chances = torch.tensor(chances, dtype=torch.float64)
        drawn = (chances / chances.sum()).multinomial(n - 1, generator=self._generator) + 1
        return [*sorted(drawn.tolist()), d_sae]

    def _lower(self, log_theta: torch.Tensor, fall: float) -> None:
        """ln θ of dead latents falls, to 1 below the mean of the live ones at most."""
        dead = self.since_fired >= self.dead_after
        for i in range(len(log_theta)) if not dead.all() else ():
            lowest = log_theta[~dead].mean() - 1
            if dead[i] and log_theta[i] > lowest:
                log_theta[i] = max(log_theta[i] - fall, lowest)

    def _threshold_lr(self) -> float:
        muon = any(name.startswith("muon.") for name in self.moments)
        return self.cfg.activation.threshold_lr or self.lr * (1 if muon else 5)

    # --- Sparsity --------------------------------------------------------------------------

    def _coefficient(self, factor: float, variance: float) -> float:
        """λ: as given, or for a target from the errors of the steps before."""
        target = self.objective.target_l0
        if target is None:
            given = self.objective.sparsity_coeff
            return (1e-3 if given is None else given) * factor
        error, integral = self.control["error"], self.control["sum"]
        if self.cfg.activation.kind == "jump-relu":
            return 2 * variance / target * (math.exp(error) - 1 + integral)
        return math.sqrt(variance) * 1e-3 * math.exp(integral + error / 2)

    def _observe(self, l0: float) -> None:
        target, control = self.objective.target_l0, self.control
        if target is None:
            return
        now = min(1.0, max(-1.0, math.log(max(l0, 1e-3) / target)))
        control["sum"] += 0.02 * now
        control["error"] = 0.9 * control["error"] + 0.1 * now

    # --- Loss ------------------------------------------------------------------------------

    def _activate(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, and what λ is multiplied with."""
        activation, none = self.cfg.activation, torch.zeros(())
        match activation.kind:
            case "relu":
                self._note(z)
                return z * (z > 0), (z * (z > 0)).sum()
            case "top-k":
                cut = self._cut(z, activation.top_k)
                self._note(z - cut)
                return z * (z > cut), none
            case "batch-top-k":
                cut = self._cut(z.flatten(), activation.top_k * z.shape[0])
                self._note(z - cut)
                if (z > cut).any():
                    smallest, m = z[z > cut].min().item(), activation.threshold_momentum
                    old = self.threshold
                    self.threshold = m * old + (1 - m) * smallest if old else smallest
                return z * (z > cut), none
            case "jump-relu":
                theta = self.params["log_threshold"].exp()
                width = activation.kernel_width * theta.detach()
                self._note(z - theta)
                self._note((z - theta).abs() - width / 2)
                return RectangleJumpRelu.apply(z, theta, width), RectangleStep.apply(
                    z, theta, width
                ).sum()
        raise AssertionError(activation)

    def _cut(self, z: torch.Tensor, k: int) -> torch.Tensor:
        """What the k largest of the last axis and the others lie on either side of; at least 0."""
        ordered = z.detach().sort(descending=True).values
        if k >= z.shape[-1]:
            return torch.zeros(())
        return ((ordered[..., k - 1] + ordered[..., k]) / 2).clamp(min=0)[..., None]

    def _aux(self, x: torch.Tensor, z: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        """α · min(n_dead/k_aux, 1) · v · Σ‖e - ê‖² / Σ‖e‖², with ê of the k_aux largest
        pre-activations of dead latents."""
        dead = self.since_fired >= self.dead_after
        n_dead, d_model = int(dead.sum()), x.shape[1]
        k_aux = self.objective.k_aux or min(512, 2 ** math.floor(math.log2(max(d_model // 2, 1))))
        variance = (x - x.mean(0)).square().mean()
        e = (x - x_hat).detach()
        if not n_dead or not self.objective.aux_coeff or not e.any():
            return torch.zeros(())
        picked = z[:, dead]
        if n_dead > k_aux:
            ordered = picked.detach().sort(descending=True).values
            cut = (ordered[:, k_aux - 1] + ordered[:, k_aux])[:, None] / 2
            self._note(picked - cut)
            picked = picked * (picked > cut)
        e_hat = picked @ self.params["W_dec"][dead]
        ratio = (e - e_hat).square().sum() / e.square().sum()
        return self.objective.aux_coeff * min(n_dead / k_aux, 1) * variance * ratio

    def _note(self, distances: torch.Tensor) -> None:
        self.margin = min(self.margin, distances.abs().min().item())

    # --- Optimisers ------------------------------------------------------------------------

    def _adam(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """m̂ / (√v̂ + ε) (Kingma & Ba 2015, algorithm 1)."""
        m, v = self.moments[f"adam.{name}.m"], self.moments[f"adam.{name}.v"]
        m.copy_(BETA1 * m + (1 - BETA1) * grad)
        v.copy_(BETA2 * v + (1 - BETA2) * grad**2)
        return m / (1 - BETA1**self.t) / ((v / (1 - BETA2**self.t)).sqrt() + EPS)

    def _muon(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """0.2·√max(shape) times Nesterov momentum on whose singular values, over their norm, five
        rounds of the quintic were applied (Jordan et al. 2024; Liu et al. 2025)."""
        m = self.moments[f"muon.{name}.m"]
        m.copy_(0.95 * m + 0.05 * grad)
        u, s, vh = torch.linalg.svd(0.95 * m + 0.05 * grad, full_matrices=False)
        s = s / s.norm().clamp(min=1e-14)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return 0.2 * math.sqrt(max(grad.shape)) * (u * s) @ vh


class RectangleJumpRelu(torch.autograd.Function):
    """JumpReLU and its pseudo-derivatives (arXiv:2407.14435, eqs. 8, 11)."""

    @staticmethod
    def forward(ctx, z, theta, eps):
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return z * (z > theta)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        u = (z - theta) / ctx.eps
        kernel = ((u > -0.5) & (u < 0.5)).to(z.dtype)
        return grad * (z > theta), (grad * (-theta / ctx.eps) * kernel).sum(0), None


class RectangleStep(torch.autograd.Function):
    """Heaviside step with its pseudo-derivative (eq. 12)."""

    @staticmethod
    def forward(ctx, z, theta, eps):
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        u = (z - theta) / ctx.eps
        kernel = ((u > -0.5) & (u < 0.5)).to(z.dtype)
        return None, (grad * (-1 / ctx.eps) * kernel).sum(0), None
