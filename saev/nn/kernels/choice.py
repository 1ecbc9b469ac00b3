"""Which kernels a training step uses: Triton's where they work, else the lines of torch."""

import importlib.util
import logging
import typing as tp

import torch
from torch import Tensor

from saev.errors import ConfigError
from saev.nn.kernels import sparse
from saev.nn.kernels.sparse import Codes, group_by_latent
from saev.nn.ranks import ALONE, Ranks
from saev.once import say_once

logger = logging.getLogger(__name__)

Kernels = tp.Literal["auto", "reference", "triton"]

_TOKENS = 16
_MEMBERS = 2


class Shape(tp.NamedTuple):
    """What kernels are compiled for: the shape of the SAEs."""

    d_model: int
    d_sae: int
    top_k: int
    """The largest of the members; 1 if their codes are dense."""
    n_prefixes: int
    bf16: bool


def use_triton(wanted: Kernels, device: torch.device, shape: Shape, ranks: Ranks = ALONE) -> bool:
    """Whether to use Triton's kernels for SAEs of a shape. All ranks decide alike.

    ``auto`` says in one line why it does not use them on a GPU. On a CPU it never does.

    Raises:
        ConfigError: ``triton`` is wanted, but they cannot be used.
    """
    if wanted == "reference" or (wanted == "auto" and device.type != "cuda"):
        return False
    reasons = [reason for reason in ranks.collect(why_not(device, shape)) if reason]
    if not reasons:
        return True
    if wanted == "triton":
        raise ConfigError(
            f"--kernels triton cannot be used here: {reasons[0]}. Give --kernels auto, which uses "
            "torch where Triton does not work."
        )
    say_once(
        logger,
        f"Training uses torch, not Triton's kernels: {reasons[0]}.",
        level=logging.INFO,
        key="triton",
    )
    return False


def why_not(device: torch.device, shape: Shape) -> str:
    """Why Triton's kernels cannot be used; empty if they can.

    Each kernel runs once, on a small batch with SAEs of this shape, and is compared with torch.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # Triton fails in many ways: no compiler for its driver stub, no libcuda, too little memory of a
    # card, a cache that cannot be written. Whatever it is, torch can do the work.
    try:
        from triton import knobs

        if device.type != "cuda" and not knobs.runtime.interpret:
            return f"they need a CUDA GPU, and the device is {device}"
        wrong = _wrong(device, shape)
    except Exception as err:
        reason = (str(err).strip().splitlines() or [""])[0].rstrip(".")
        return f"{type(err).__name__}: {reason}" if reason else type(err).__name__
    return f"the kernel of {wrong} gives other results than torch" if wrong else ""


class _Case:
    """A small batch for SAEs of a shape, with the same values every time."""

    def __init__(self, device: torch.device, shape: Shape):
        self.device, self.shape = device, shape
        self.dtype = torch.bfloat16 if shape.bf16 else torch.float32
        # Enough latents for codes and prefixes; how many there are changes no kernel but selection.
        self.n_latents = min(shape.d_sae, max(64, 4 * shape.top_k, shape.n_prefixes))
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int) -> Tensor:
        """Normal values."""
        return torch.randn(size, generator=self._generator).to(self.device)

    def codes(self) -> Codes:
        """TopK codes."""
        k = self.shape.top_k
        z = self.normal(_TOKENS, _MEMBERS, self.n_latents)
        latents = z.transpose(0, 1).argsort(dim=-1, descending=True)[..., :k].sort(dim=-1).values
        values = z.transpose(0, 1).gather(-1, latents).relu().flatten()
        offset = torch.arange(_MEMBERS, device=self.device)[:, None, None] * self.n_latents
        ptr = torch.arange(_MEMBERS * _TOKENS + 1, dtype=torch.int32, device=self.device) * k
        return Codes(values, (latents + offset).flatten().to(torch.int32), ptr)


@torch.no_grad()
def _wrong(device: torch.device, shape: Shape) -> str:
    """The first kernel whose results are not those of its reference; empty if there is none."""
    checks = {
        "selection": _selection_agrees,
        "the decoder": _decoder_agrees,
        "the gradients": _bags_agree,
        "the update": _upkeep_agrees,
    }
    return next((what for what, agrees in checks.items() if not agrees(_Case(device, shape))), "")


def _selection_agrees(case: _Case) -> bool:
    from saev.nn.kernels.triton import select

    shape = case.shape
    if not select.supports(shape.d_sae, shape.top_k):
        return True  # it is not used
    z = case.normal(_TOKENS, _MEMBERS, shape.d_sae).to(case.dtype)
    top_k = torch.full((_MEMBERS,), shape.top_k, dtype=torch.int32, device=case.device)
    found = select.top_k(z, top_k, shape.top_k, same=True)
    return _same(found, select.top_k_reference(z, top_k, shape.top_k, same=True), 0.0)


def _decoder_agrees(case: _Case) -> bool:
    from saev.nn.kernels.triton import decode

    n_p, d_model = case.shape.n_prefixes, case.shape.d_model
    codes = case.codes()
    table = case.normal(_MEMBERS * case.n_latents, d_model).to(case.dtype)
    b_dec, x = case.normal(_MEMBERS, d_model), case.normal(_TOKENS, d_model)
    ends = torch.arange(1, n_p + 1, device=case.device) * case.n_latents // n_p
    lengths = ends.repeat(_MEMBERS, 1)
    weights = torch.full_like(lengths, 1 / n_p, dtype=torch.float32)
    found = decode.decode(codes, table, b_dec, x, lengths, weights, residual=True)
    want = sparse.decode(codes, table.float(), b_dec, x, lengths, weights, residual=True)
    entries = want.source.long()
    grads = [out.grads.flatten(0, 1)[entries].float() for out in (found, want)]
    tolerance = 0.02 if case.shape.bf16 else 1e-3
    assert found.residual is not None
    assert want.residual is not None
    return (
        torch.equal(found.source, want.source)
        and _same(
            (found.errors, found.residual, found.grad_values),
            (want.errors, want.residual, want.grad_values),
            1e-3,
        )
        and _same(grads[:1], grads[1:], tolerance)
    )


def _bags_agree(case: _Case) -> bool:
    from saev.nn.kernels.triton import bags

    codes = case.codes()
    n_bags = _MEMBERS * case.n_latents
    often = codes.latents.clone()
    often[::2] = 0  # a bag that is cut into pieces, if there are enough entries
    grouped = group_by_latent(often, n_bags)
    source = torch.arange(len(often), dtype=torch.int32, device=case.device)
    rows = case.normal(_TOKENS, case.shape.d_model).to(case.dtype)
    sides = []
    for add, table in ((bags.add_bags, rows), (sparse.add_bags, rows.float())):
        out = torch.ones(n_bags, case.shape.d_model, device=case.device)
        sides.append((out, *add(out, table, grouped, source, codes.values, case.shape.top_k)))
    return _same(sides[0], sides[1], 1e-3)


def _upkeep_agrees(case: _Case) -> bool:
    from saev.nn.kernels.triton import upkeep

    size = (_MEMBERS, _TOKENS, case.shape.d_model)
    w, grad, m, v = (case.normal(*size) for _ in range(4))
    one = torch.ones(_MEMBERS, device=case.device)
    sides = []
    for remove, update in (
        (upkeep.remove_parallel, upkeep.update),
        (upkeep.remove_parallel_reference, upkeep.update_reference),
    ):
        state = (w.clone(), grad.clone(), m.clone(), v.square())
        squares = remove(state[0], state[1], one)
        update(*state, torch.stack([0.1 * one, 0.5 * one, one], dim=1))
        sides.append((squares, *state))
    return _same(sides[0], sides[1], 1e-3)


def _same(found: tp.Sequence[Tensor], want: tp.Sequence[Tensor], tolerance: float) -> bool:
    """Whether tensors are equal but for a share of the largest value. NaN is a difference."""
    return all(
        bool(((a.double() - b.double()).abs() <= tolerance * b.double().abs().max()).all())
        for a, b in zip(found, want, strict=True)
    )
