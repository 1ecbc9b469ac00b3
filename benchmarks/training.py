"""SAE-tokens per second of a training step, beside its parts and a plain autograd step.

    python benchmarks/training.py               # 4 minutes
    python benchmarks/training.py --small       # a trial

A step of N SAEs on a batch of B tokens makes N·B SAE-tokens. Batches are in memory; reading them is
benchmarks/loader.py. Measured in turn, on random activations:

- banks of 1 and 8 SAEs: TopK with and without a Matryoshka objective, BatchTopK, ReLU;
- one ReLU and one JumpReLU SAE beside the five products that dense latents take, in CPU seconds of
  all threads;
- bounds: the encoder's product alone, the selection of the k largest alone, and both;
- baseline: the same loss by autograd, dense matrices and torch.optim.Adam, one SAE after another;
- one wide encoder product for 8 SAEs against 8 narrow ones (why a bank on the CPU has narrow ones).
"""

import argparse
import time
import typing as tp
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Report, alternate, invocation, parser, per_second

from saev.config import BatchTopK, JumpRelu, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.config.sae import Activation, Objective
from saev.nn import SaeBank, activations
from saev.nn.encode import largest
from saev.nn.kernels import sparse

MANY = 8
KINDS: dict[str, tuple[Activation, Objective, dict[int, float]]] = {
    "TopK 32": (TopK(top_k=32), Vanilla(), {1: 9e3, MANY: 9e3}),
    "TopK 32, Matryoshka (10 prefixes)": (
        TopK(top_k=32), Matryoshka(n_prefixes=10), {1: 9e3, MANY: 9e3},
    ),
    "BatchTopK 32": (BatchTopK(top_k=32), Vanilla(), {}),
    "ReLU": (Relu(), Vanilla(), {MANY: 5e3}),
}  # fmt: skip
"""Activation, objective, and the targets by number of SAEs, in SAE-tokens/s."""


def make_bank(n: int, activation: Activation, objective: Objective, args: tp.Any) -> SaeBank:
    """n SAEs that differ in seed and learning rate."""
    cfg = SaeConfig(d_sae=args.d_sae, activation=activation)
    lrs = [1e-4 * (i + 1) for i in range(n)]
    return SaeBank([cfg] * n, [objective] * n, lrs, range(n), args.d_model, device=args.device)


def autograd_step(args: argparse.Namespace, x: torch.Tensor) -> Callable[[], None]:
    """One step of one TopK SAE as autograd does it."""
    member = make_bank(1, TopK(top_k=32), Vanilla(), args).members()[0]
    params = {k: p.clone().requires_grad_() for k, p in member.state_dict().items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-4, fused=True)

    def step() -> None:
        z = x @ params["W_enc"] + params["b_enc"]
        x_hat = activations.top_k(z, 32) @ params["W_dec"] + params["b_dec"]
        optimizer.zero_grad()
        (x - x_hat).square().mean().backward()
        w, grad = params["W_dec"].data, params["W_dec"].grad
        assert grad is not None
        grad -= (grad * w).sum(1, keepdim=True) * w
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        w /= w.norm(dim=1, keepdim=True)

    return step


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=7)
    made.add_argument("--d-model", type=int, default=384)
    made.add_argument("--d-sae", type=int, default=6144)
    made.add_argument("--batch", type=int, default=4096)
    made.add_argument("--device", default="cpu")
    args = made.parse_args()
    if args.small:
        args.d_sae, args.batch = 1536, 512
    report = Report(invocation(), args.json)
    x = torch.randn(args.batch, args.d_model, generator=torch.Generator().manual_seed(0))
    x = x.to(args.device)

    bank = make_bank(MANY, TopK(top_k=32), Vanilla(), args)
    w_enc, w_dec = bank.params["W_enc"], bank.params["W_dec"][0]
    z = F.linear(x, w_enc[0])
    rows = max(1, (16 << 20) // (4 * args.d_sae))
    found = alternate(
        {
            "encode": per_second(
                lambda: [F.linear(x_c, w_enc[0]) for x_c in x.split(rows)], args.batch
            ),
            "select": per_second(lambda: largest(z, 32, ordered=False), args.batch),
            "wide": per_second(
                lambda: F.linear(x, w_enc.view(-1, args.d_model)), args.batch * MANY
            ),
            "narrow": per_second(lambda: [F.linear(x, w) for w in w_enc], args.batch * MANY),
            "autograd": per_second(autograd_step(args, x), args.batch),
        },
        args.repeats,
    )
    report.add("bound: encoder's product alone", found["encode"], "tokens/s")
    report.add("bound: selection of 32 alone", found["select"], "tokens/s")
    both = [1 / (1 / e + 1 / s) for e, s in zip(found["encode"], found["select"], strict=True)]
    report.add("bound: both", both, "tokens/s")
    report.add("baseline: autograd, dense, one SAE", found["autograd"], "SAE-tokens/s")
    report.share(f"one wide product for {MANY} ÷ {MANY} narrow", found["wide"], found["narrow"])

    for name, (activation, objective, targets) in KINDS.items():
        banks = {n: make_bank(n, activation, objective, args) for n in (1, MANY)}
        runs = {
            str(n): per_second(lambda bank=bank: bank.step(x), n * args.batch)
            for n, bank in banks.items()
        }
        found = alternate(runs, args.repeats)
        for n in banks:
            report.add(f"{name}, N = {n}", found[str(n)], "SAE-tokens/s", at_least=targets.get(n))
        # 5%: repeated runs of one and the same step differ by more
        report.share(
            f"{name}: N = {MANY} ÷ N = 1, per SAE", found[str(MANY)], found["1"], at_least=0.95
        )
    dense_steps(report, args, x)
    sparse_decode(report, x, z, w_dec, args.repeats)
    report.close()


def dense_steps(report: Report, args: argparse.Namespace, x: torch.Tensor) -> None:
    """Rows of steps with dense latents beside their five products."""
    banks = {
        "ReLU": make_bank(1, Relu(), Vanilla(), args),
        "JumpReLU": make_bank(1, JumpRelu(), Vanilla(), args),
    }
    w_enc, w_dec = (banks["ReLU"].params[name][0] for name in ("W_enc", "W_dec"))
    grad = torch.randn_like(x)
    sums = [torch.zeros_like(w_enc) for _ in range(2)]
    most = max(1, (32 << 20) // (4 * args.d_sae))
    rows = -(-len(x) // -(-len(x) // most))  # chunks as in a step

    def products() -> None:
        for x_c, grad_c in zip(x.split(rows), grad.split(rows), strict=True):
            f = x_c @ w_enc.T
            _ = f @ w_dec
            grad_f = grad_c @ w_dec.T
            sums[0] += f.T @ grad_c
            sums[1] += grad_f.T @ x_c

    def cpu_rate(run: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            start = time.process_time()
            run()
            return len(x) / (time.process_time() - start)

        return timed

    runs = {name: cpu_rate(lambda bank=bank: bank.step(x)) for name, bank in banks.items()}
    found = alternate({"products": cpu_rate(products), **runs}, args.repeats)
    for name in banks:
        ratios = [of / one for of, one in zip(found["products"], found[name], strict=True)]
        report.add(f"{name}, N = 1 ÷ its five products, CPU seconds", ratios, "×", at_most=1.3)


def sparse_decode(
    report: Report, x: torch.Tensor, z: torch.Tensor, w_dec: torch.Tensor, repeats: int
) -> None:
    """Rows for the decoder, forward and backward."""
    n = len(x)
    f = activations.top_k(z, 32)
    top = f.topk(32, dim=1)
    latents, order = top.indices.sort(dim=1)
    ptr = torch.arange(n + 1, dtype=torch.int32, device=x.device) * 32
    codes = sparse.Codes(
        top.values.gather(1, order).flatten(), latents.flatten().to(torch.int32), ptr
    )
    f, w, bias = f.requires_grad_(), w_dec.clone().requires_grad_(), torch.zeros_like(x[:1])
    lengths, weights = torch.full((1, 1), len(w)), torch.ones(1, 1)

    def sparsely() -> None:
        out = sparse.decode(codes, w_dec, bias, x, lengths, weights, residual=False)
        grouped = sparse.group_by_latent(codes.latents, len(w_dec))
        grad = torch.zeros_like(w_dec)
        sparse.add_bags(grad, out.grads[:, 0], grouped, out.source, codes.values)

    found = alternate(
        {
            "sparse": per_second(sparsely, n),
            "dense": per_second(lambda: (f @ w - x).square().sum().backward(), n),
        },
        repeats,
    )
    report.share("decoder, forward and backward: sparse ÷ dense", found["sparse"], found["dense"])


if __name__ == "__main__":
    main()
