"""A training step of 8 SAEs on a GPU, beside a plain loop over them and the matrix rate.

    python benchmarks/gpu.py                            # needs a CUDA GPU
    python benchmarks/gpu.py --device cpu --small       # a trial anywhere

d_model 1024, d_sae 16384, TopK 32, Matryoshka with 10 prefixes, batches of 16384. Measured in turn:

- bank: SaeBank.step, bfloat16 products;
- loop: the same loss for one SAE after another as a researcher writes it: bfloat16 autocast, dense
  codes, one decoder product per prefix, autograd, gradient clipping, fused torch.optim.Adam;
- matrix rate: one large square bfloat16 product; and the bank's encoder product.

And, if a folder is given or made, the loader with its windows on the GPU.
"""

import argparse
import tempfile
import typing as tp
from collections.abc import Callable

import torch
from activations import LAYER, Folder, write
from harness import Report, alternate, invocation, parser, per_second
from loader import second_epoch

from saev.config import LoaderConfig, Matryoshka, SaeConfig, TopK
from saev.loaders import ShuffledLoader
from saev.nn import SaeBank, activations
from saev.nn.encode import pre_activations
from saev.nn.weights import Weights
from saev.shards import Shards

N_PREFIXES = 10


def make_bank(args: argparse.Namespace) -> SaeBank:
    """The SAEs."""
    cfg = SaeConfig(d_sae=args.d_sae, activation=TopK(top_k=args.top_k))
    objective = Matryoshka(n_prefixes=N_PREFIXES)
    return SaeBank(
        [cfg] * args.n, [objective] * args.n, [1e-4] * args.n, range(args.n), args.d_model,
        device=args.device, bf16=True,
    )  # fmt: skip


def loop_step(bank: SaeBank, args: argparse.Namespace, x: torch.Tensor) -> Callable[[], None]:
    """The plain implementation."""
    members = bank.members()
    params = [
        {k: p.detach().clone().requires_grad_() for k, p in m.state_dict().items()} for m in members
    ]
    optimizers = [torch.optim.Adam(p.values(), lr=1e-4, fused=True) for p in params]
    cuts = torch.linspace(0, args.d_sae, N_PREFIXES + 1).long().tolist()[1:]

    def step() -> None:
        for p, optimizer in zip(params, optimizers, strict=True):
            with torch.autocast(x.device.type, torch.bfloat16):
                f = activations.top_k(x @ p["W_enc"] + p["b_enc"], args.top_k)
                losses = [
                    (f[:, :cut] @ p["W_dec"][:cut] + p["b_dec"] - x).float().square().mean()
                    for cut in cuts
                ]
            optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()
            w, grad = p["W_dec"].data, p["W_dec"].grad
            assert grad is not None
            grad -= (grad * w).sum(1, keepdim=True) * w
            torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
            optimizer.step()
            w /= w.norm(dim=1, keepdim=True)

    return step


def loader_rows(report: Report, args: argparse.Namespace, root: str) -> None:
    """Rows about the loader."""
    url = write(root, Folder(args.mb, args.d_model, "bfloat16"))
    cfg = LoaderConfig(layer=LAYER, buffer_mb=args.mb / 4, n_threads=args.threads)

    def make() -> ShuffledLoader:
        return ShuffledLoader(Shards.open(url), cfg, args.batch, epochs=2, device=args.device)

    run = second_epoch(make)
    found = [run() for _ in range(args.repeats)]
    report.add("loader, bfloat16 shards, windows on the device", found, "rows/s")
    size = args.d_model * 2 / 1e9
    report.add("  as bytes", [v * size for v in found], "GB/s")


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=10)
    made.add_argument("--n", type=int, default=8, help="SAEs")
    made.add_argument("--d-model", type=int, default=1024)
    made.add_argument("--d-sae", type=int, default=16_384)
    made.add_argument("--top-k", type=int, default=32)
    made.add_argument("--batch", type=int, default=16_384)
    made.add_argument("--mb", type=float, default=4000, help="size of the loader's folder")
    made.add_argument("--threads", type=int, default=8, help="reader threads")
    made.add_argument("--device", default="cuda")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    args = made.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        made.error("torch sees no CUDA GPU here. Use --device cpu --small for a trial.")
    if args.small:
        args.d_model, args.d_sae, args.batch, args.mb, args.n = 64, 512, 256, 20, 2
    torch.set_float32_matmul_precision("high")
    report = Report(invocation(), args.json)
    x = torch.randn(args.batch, args.d_model, device=args.device)
    bank = make_bank(args)
    weights = Weights(**bank.params)
    side = 256 if args.small else 8192
    a, b = (torch.randn(side, side, device=args.device).bfloat16() for _ in range(2))
    flop = 2 * args.batch * args.d_model * args.d_sae
    one = weights.member(0)
    tokens = args.n * args.batch
    found = alternate(
        {
            "bank": per_second(lambda: bank.step(x), tokens),
            "loop": per_second(loop_step(bank, args, x), tokens),
            "matrix": per_second(lambda: a @ b, 2 * side**3 / 1e12),
            "encode": per_second(lambda: pre_activations(one, x, True), flop / 1e12),
        },
        args.repeats,
    )
    report.add(f"bank of {args.n}", found["bank"], "SAE-tokens/s")
    report.add("plain loop", found["loop"], "SAE-tokens/s")
    report.share("bank ÷ plain loop", found["bank"], found["loop"], at_least=10)
    report.add("matrix rate, bfloat16", found["matrix"], "TFLOP/s")
    report.share("encoder's product ÷ matrix rate", found["encode"], found["matrix"], at_least=0.5)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        report.add("peak memory of the GPU, all of the above", [peak], "GB")
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        loader_rows(report, args, root)
    report.close()


if __name__ == "__main__":
    main()
