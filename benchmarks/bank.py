"""What a bank costs: N SAEs together against one after another, and sparse against dense decoding.

    python benchmarks/bank.py [--n 4] [--d-model 384] [--d-sae 1536] [--batch 4096] [--top-k 32]

Prints ratios; every time is the median of several runs. The dense reference is the same loss with
autograd, dense matrix products and torch.optim.Adam.
"""

import argparse
import statistics
import time
import typing as tp

import torch
import torch.nn.functional as F

from saev.config import SaeConfig, TopK, Vanilla
from saev.nn import SaeBank, activations, sparse


def seconds(run: tp.Callable[[], object], repeats: int = 5) -> float:
    """Median time of one call, after a first one that does not count."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def make_bank(n: int, args: argparse.Namespace, device: str) -> SaeBank:
    """n SAEs that differ in seed and learning rate."""
    cfg = SaeConfig(d_sae=args.d_sae, activation=TopK(top_k=args.top_k))
    lrs = [1e-4 * (i + 1) for i in range(n)]
    return SaeBank([cfg] * n, [Vanilla()] * n, lrs, range(n), args.d_model, device=device)


def dense_step(args: argparse.Namespace, x: torch.Tensor) -> tp.Callable[[], None]:
    """One step of one TopK SAE as autograd does it."""
    member = make_bank(1, args, str(x.device)).members()[0]
    params = {k: p.clone().requires_grad_() for k, p in member.state_dict().items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-4, fused=True)

    def step() -> None:
        z = x @ params["W_enc"] + params["b_enc"]
        x_hat = activations.top_k(z, args.top_k) @ params["W_dec"] + params["b_dec"]
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
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, value in [
        ("n", 4),
        ("d-model", 384),
        ("d-sae", 1536),
        ("batch", 4096),
        ("top-k", 32),
    ]:
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, n = args.device, args.n
    x = torch.randn(args.batch, args.d_model).to(device)
    print(f"{device}, {torch.get_num_threads()} threads: {vars(args)}")

    bank, alone = make_bank(n, args, device), [make_bank(1, args, device) for _ in range(n)]
    together = seconds(lambda: bank.step(x))
    apart = seconds(lambda: [b.step(x) for b in alone])
    dense = seconds(dense_step(args, x))
    print(f"a step of {n} SAEs in a bank    {together * 1e3:9.1f} ms")
    print(f"  one after another            {apart * 1e3:9.1f} ms   {apart / together:5.2f} x")
    print(
        f"  {n} times dense autograd      {n * dense * 1e3:9.1f} ms   {n * dense / together:5.2f} x"
    )

    w_enc = bank.params["W_enc"]
    wide = seconds(lambda: F.linear(x, w_enc.view(-1, args.d_model)))
    narrow = seconds(lambda: [F.linear(x, w) for w in w_enc])
    print(f"one wide encoder product       {wide * 1e3:9.1f} ms")
    print(f"  {n} narrow ones               {narrow * 1e3:9.1f} ms   {narrow / wide:5.2f} x")

    w_dec = bank.params["W_dec"][0]
    f = activations.top_k(F.linear(x, w_enc[0]), args.top_k)
    top = f.topk(args.top_k, dim=1)
    latents, order = top.indices.sort(dim=1)
    ptr = torch.arange(args.batch + 1, dtype=torch.int32, device=device) * args.top_k
    values = top.values.gather(1, order).flatten().requires_grad_()
    codes = sparse.Codes(values, latents.flatten().to(torch.int32), ptr)
    grad = torch.randn_like(x)
    f, w = f.requires_grad_(), w_dec.clone().requires_grad_()
    forward = seconds(lambda: sparse.decode(codes, w_dec))
    dense_forward = seconds(lambda: f @ w_dec)
    both = seconds(lambda: sparse.decode(codes, w).backward(grad))
    dense_both = seconds(lambda: (f @ w).backward(grad))
    print(f"sparse decoding                {forward * 1e3:9.1f} ms")
    ratio = dense_forward / forward
    print(f"  dense                        {dense_forward * 1e3:9.1f} ms   {ratio:5.2f} x")
    print(f"sparse forward and backward    {both * 1e3:9.1f} ms")
    print(f"  dense                        {dense_both * 1e3:9.1f} ms   {dense_both / both:5.2f} x")


if __name__ == "__main__":
    main()
