"""What a training step, and all that feeds it and follows it, reaches on one GPU: 8 minutes.

    python benchmarks/gpu.py                            # needs a CUDA GPU
    python benchmarks/gpu.py --device cpu --small       # a trial anywhere
    python benchmarks/gpu.py --only steps profile       # some sections

d_model 1024, d_sae 16384, TopK 32, batches of 16384, random activations. Sections:

- limits: the rate of a large bfloat16 product, and of a copy in the GPU's memory;
- baseline: one SAE as a researcher writes it: bfloat16 autocast, dense codes, autograd, gradient
  clipping, fused torch.optim.Adam; with torch.compile and without, and with 10 Matryoshka prefixes;
- peers: the fused encoder of eai-sparsify, if it is installed;
- steps: SaeBank.step of TopK, BatchTopK, Matryoshka and ReLU, for 1 and 8 SAEs, with Triton's
  kernels and without, and the peak of the GPU's memory;
- skewed, dead, narrow: 8 SAEs of which 16 latents are active on 60% of the tokens; of which 30% of
  the latents are dead; and of shape 384 → 1536;
- profile: where the time of a step goes, and the rates of its parts beside the card's;
- loader: rows/s with windows on the GPU, and training that reads from it;
- evaluation, measuring, extraction: codes and reconstructions of a batch; `saev inference` for one
  SAE and several; and `saev shards` with ViT-L/14 beside its bare forward pass.

Sections run in a process of their own. One that fails, hangs or breaks the GPU's context is a line
of the table, and a new process does the rest. With --small, Triton's kernels run in its
interpreter, a thousand times slower: the trial takes minutes with them, and one without
(--no-kernels).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import typing as tp
from collections.abc import Callable
from pathlib import Path

if "cpu" in sys.argv:  # before anything imports Triton's kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from activations import LAYER, Folder, write
from harness import Report, Row, alternate, invocation, parser, per_second, synchronize
from loader import second_epoch

from saev.config import BatchTopK, LoaderConfig, Matryoshka, Relu, SaeConfig, TopK, Vanilla
from saev.config.sae import Activation, Objective
from saev.loaders import ShuffledLoader
from saev.nn import SaeBank, activations, codes
from saev.nn.kernels.choice import Kernels
from saev.shards import Shards

N_PREFIXES = 10
SECTION_SECONDS = 150
"""Most that a section may take."""


class Bench:
    """What sections share."""

    def __init__(self, args: argparse.Namespace, report: Report, root: str):
        self.args, self.report, self.root = args, report, root
        self.device = torch.device(args.device)
        self.kernels: tuple[Kernels, ...] = (
            ("reference",) if args.no_kernels else ("reference", "triton")
        )
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(args.batch, args.d_model, generator=generator).to(self.device)

    def bank(
        self,
        activation: Activation,
        objective: Objective,
        n: int,
        kernels: Kernels,
        d_model: int = 0,
        d_sae: int = 0,
    ) -> SaeBank:
        """SAEs that differ in their seeds."""
        cfg = SaeConfig(d_sae=d_sae or self.args.d_sae, activation=activation)
        return SaeBank(
            [cfg] * n, [objective] * n, [1e-4] * n, range(n), d_model or self.args.d_model,
            device=self.device, bf16=True, kernels=kernels,
        )  # fmt: skip

    def alternate(self, runs: tp.Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Runs in turn. The interpreter needs no warm-up."""
        return alternate(runs, self.args.repeats, warm_up=not self.args.small)

    def pairs(
        self, what: str, make: Callable[[Kernels], SaeBank], x: torch.Tensor | None = None
    ) -> None:
        """Rows of a step with Triton's kernels and without, and their ratio."""
        x = self.x if x is None else x
        runs = {}
        for kernels in self.kernels:
            try:
                bank = make(kernels)
                if not self.args.small:
                    bank.step(x)
                    synchronize()
            except Exception as err:
                self.report.leave_out(f"{what}, {kernels}", first_line(err))
                continue
            tokens = len(bank) * len(x)
            runs[kernels] = per_second(lambda bank=bank: bank.step(x), tokens)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = self.alternate(runs)
        for kernels, rates in found.items():
            self.report.add(f"{what}, {kernels}", rates, "SAE-tokens/s")
        if len(found) == 2:
            self.report.share(f"{what}: triton ÷ reference", found["triton"], found["reference"])

    def peak(self, what: str) -> None:
        """A row about memory since the last steps began."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e9
            self.report.add(f"{what}: peak memory of the GPU, both banks", [peak], "GB")


def first_line(err: BaseException) -> str:
    """An exception in a cell of a table."""
    lines = str(err).strip().splitlines() or [""]
    return f"{type(err).__name__}: {lines[0][:200]}".replace("|", "/")


# --- Limits, baselines and peers ------------------------------------------------------------------


def limits(bench: Bench) -> None:
    """The card's rates."""
    side = 256 if bench.args.small else 8192
    a, b = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
    source = torch.zeros(side * side * 4, device=bench.device)
    target = torch.empty_like(source)
    found = bench.alternate(
        {
            "matrix": per_second(lambda: a @ b, 2 * side**3 / 1e12),
            "copy": per_second(lambda: target.copy_(source), 2 * source.nbytes / 1e9),
        }
    )
    bench.report.add("matrix rate, bfloat16", found["matrix"], "TFLOP/s")
    bench.report.add("copy in memory, read and write", found["copy"], "GB/s")


def baseline(bench: Bench) -> None:
    """The plain implementation of one SAE."""
    runs = {
        "plain loop, TopK": plain_step(bench, 1, compiled=False),
        "plain loop, Matryoshka": plain_step(bench, N_PREFIXES, compiled=False),
    }
    if not bench.args.small:
        compiled = plain_step(bench, 1, compiled=True)
        try:
            compiled()
            runs["plain loop, TopK, compiled"] = compiled
        except Exception as err:
            bench.report.leave_out("plain loop, TopK, compiled", first_line(err))
    rates = {name: per_second(step, len(bench.x)) for name, step in runs.items()}
    for name, values in bench.alternate(rates).items():
        bench.report.add(name, values, "SAE-tokens/s")


def plain_step(bench: Bench, n_prefixes: int, *, compiled: bool) -> Callable[[], None]:
    """One step of one SAE."""
    args, x = bench.args, bench.x
    member = bench.bank(TopK(top_k=args.top_k), Vanilla(), 1, "reference").members()[0]
    p = {k: v.detach().clone().requires_grad_() for k, v in member.state_dict().items()}
    optimizer = torch.optim.Adam(p.values(), lr=1e-4, fused=True)
    cuts = torch.linspace(0, args.d_sae, n_prefixes + 1).long().tolist()[1:]

    def loss_of() -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            f = activations.top_k(x @ p["W_enc"] + p["b_enc"], args.top_k)
            losses = [
                (f[:, :cut] @ p["W_dec"][:cut] + p["b_dec"] - x).float().square().mean()
                for cut in cuts
            ]
        return torch.stack(losses).mean()

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        w, grad = p["W_dec"].data, p["W_dec"].grad
        assert grad is not None
        grad -= (grad * w).sum(1, keepdim=True) * w
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        w /= w.norm(dim=1, keepdim=True)

    return step


def peers(bench: Bench) -> None:
    """Public kernels of this field."""
    from sparsify.fused_encoder import fused_encoder

    args = bench.args
    w = torch.randn(args.d_sae, args.d_model, device=bench.device, requires_grad=True)
    b = torch.zeros(args.d_sae, device=bench.device, requires_grad=True)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            fused_encoder(bench.x, w, b, args.top_k, "topk")[0].sum().backward()

    found = bench.alternate({"sparsify": per_second(step, len(bench.x))})
    bench.report.add("eai-sparsify's encoder, forward and backward", found["sparsify"], "tokens/s")


# --- Steps ----------------------------------------------------------------------------------------


def kinds(args: argparse.Namespace) -> dict[str, tuple[Activation, Objective]]:
    """What is trained."""
    k = args.top_k
    return {
        "TopK": (TopK(top_k=k), Vanilla()),
        "Matryoshka": (TopK(top_k=k), Matryoshka(n_prefixes=N_PREFIXES)),
        "BatchTopK": (BatchTopK(top_k=k), Vanilla()),
        "ReLU": (Relu(), Vanilla()),
    }


def steps_of(kind: str) -> Callable[[Bench], None]:
    """Rows of one kind of SAE."""

    def steps(bench: Bench) -> None:
        activation, objective = kinds(bench.args)[kind]
        for n in (1, bench.args.n):
            what = f"{kind}, N = {n}"
            bench.pairs(what, lambda kernels, n=n: bench.bank(activation, objective, n, kernels))
            bench.peak(what)

    return steps


def skewed(bench: Bench) -> None:
    """Some latents are active on 60% of the tokens."""
    n_often = min(16, bench.args.d_sae // 4)

    @torch.no_grad()
    def make(kernels: Kernels) -> SaeBank:
        bank = bench.bank(TopK(top_k=bench.args.top_k), Vanilla(), bench.args.n, kernels)
        for w, b in zip(bank.params["W_enc"], bank.params["b_enc"], strict=True):
            z = bench.x[:1024] @ w.T + b
            least = z.topk(bench.args.top_k, dim=1).values[:, -1].mean()
            b[:n_often] += least - z[:, :n_often].quantile(0.4, dim=0)
        return bank

    bench.pairs(f"TopK, N = {bench.args.n}, skewed", make)


def dead(bench: Bench) -> None:
    """AuxK works on 30% of the latents."""
    n_dead = round(0.3 * bench.args.d_sae)

    @torch.no_grad()
    def make(kernels: Kernels) -> SaeBank:
        bank = bench.bank(TopK(top_k=bench.args.top_k), Vanilla(), bench.args.n, kernels)
        bank.params["b_enc"][:, :n_dead] = -100
        bank.since_fired[:, :n_dead] = bank.dead_after
        bank.n_tokens = bank.dead_after
        return bank

    bench.pairs(f"TopK, N = {bench.args.n}, 30% dead", make)


def narrow(bench: Bench) -> None:
    """A small SAE."""
    d_model, d_sae = (8, 16) if bench.args.small else (384, 1536)
    x = bench.x[:, :d_model].contiguous()
    what = f"TopK, N = {bench.args.n}, {d_model} → {d_sae}"
    activation = TopK(top_k=bench.args.top_k)
    bench.pairs(
        what,
        lambda kernels: bench.bank(activation, Vanilla(), bench.args.n, kernels, d_model, d_sae),
        x,
    )


# --- Where the time goes --------------------------------------------------------------------------

PARTS = {
    "selection": ("_top_k", "topk", "gathertopk", "radixfind"),
    "products": ("gemm", "cutlass", "xmma", "nvjet", "cublas", "::mm", "addmm", "linear"),
    "decoder": ("_decode", "embedding"),
    "gradients": ("_bags", "_pieces"),
    "upkeep of decoders": ("_update", "_remove_parallel"),
    "Adam": ("adam",),
    "sort": ("sort", "radix", "scan"),
}
"""Parts of a step, by words in the names of kernels; the first that fits."""


def work(args: argparse.Namespace, n_p: int) -> dict[str, tuple[float, str]]:
    """FLOP or bytes that a part of a step needs at least, if it is done by Triton's kernels."""
    n, b, d, s, k = args.n, args.batch, args.d_model, args.d_sae, args.top_k
    return {
        "products": (2.0 * n * b * d * s / 1e12, "TFLOP/s"),
        "selection": (2.0 * n * b * s / 1e9, "GB/s"),
        "decoder": (2.0 * n * b * d * (2 * k + n_p) / 1e9, "GB/s"),
        "gradients": ((4.0 * n * b * k * d + 16.0 * n * s * d) / 1e9, "GB/s"),
        "upkeep of decoders": (40.0 * n * s * d / 1e9, "GB/s"),
        "Adam": (28.0 * n * s * d / 1e9, "GB/s"),
    }


def profile(bench: Bench) -> None:
    """Milliseconds, shares and rates of the parts of a step."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = bench.device.type == "cuda"
    n_steps = 3 if on_gpu else 1
    for kind in ("TopK", "Matryoshka"):
        for kernels in bench.kernels if on_gpu else bench.kernels[:1]:
            activation, objective = kinds(bench.args)[kind]
            bank = bench.bank(activation, objective, bench.args.n, kernels)
            bank.step(bench.x)
            synchronize()
            with profiler(
                activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
            ) as p:
                for _ in range(n_steps):
                    bank.step(bench.x)
                synchronize()
            times: dict[str, float] = {}
            for event in p.key_averages():
                if on_gpu and event.device_type != DeviceType.CUDA:
                    continue
                micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                name = event.key.lower()
                part = next(
                    (q for q, words in PARTS.items() if any(w in name for w in words)), "other"
                )
                times[part] = times.get(part, 0.0) + micros / 1e3 / n_steps
            whole = sum(times.values())
            title = f"profile of {kind}, N = {bench.args.n}, {kernels}"
            bench.report.add(f"{title}: all", [whole], "ms")
            needs = work(bench.args, N_PREFIXES if kind == "Matryoshka" else 1)
            for part, ms in sorted(times.items(), key=lambda item: -item[1]):
                if not ms:
                    continue
                bench.report.add(f"{title}: {part}", [ms], "ms")
                bench.report.add(f"{title}: {part}, share of the step", [ms / whole], "×")
                if part in needs:
                    amount, unit = needs[part]
                    bench.report.add(f"{title}: {part}, rate", [amount / ms * 1e3], unit)
            del bank
            gc.collect()


# --- What feeds a step and what follows ----------------------------------------------------------


def loader(bench: Bench) -> None:
    """Rows/s of the loader, and training from it."""
    args = bench.args
    url = write(bench.root, Folder(args.mb, args.d_model, "bfloat16"))
    cfg = LoaderConfig(layer=LAYER, buffer_mb=args.mb / 4, n_threads=args.threads)

    def make() -> ShuffledLoader:
        return ShuffledLoader(Shards.open(url), cfg, args.batch, epochs=2, device=args.device)

    run = second_epoch(make)
    repeats = min(3, args.repeats)
    found = [run() for _ in range(repeats)]
    bench.report.add("loader, bfloat16 shards, windows on the device", found, "rows/s")
    size = args.d_model * 2 / 1e9
    bench.report.add("  as bytes", [v * size for v in found], "GB/s")

    kernels: Kernels = "auto"
    n = 1 if args.small else args.n
    bank = bench.bank(TopK(top_k=args.top_k), Vanilla(), n, kernels)
    bank.step(bench.x)
    n_steps = 2 if args.small else 20

    def fed() -> None:
        with make() as batches:
            for _, batch in zip(range(n_steps), batches, strict=False):
                bank.step(batch.act)

    def alone() -> None:
        for _ in range(n_steps):
            bank.step(bench.x)

    amount = n * args.batch * n_steps
    rates = alternate({"fed": per_second(fed, amount), "alone": per_second(alone, amount)}, repeats)
    bench.report.add(f"TopK, N = {n}, fed by the loader", rates["fed"], "SAE-tokens/s")
    bench.report.share(
        f"TopK, N = {n}: fed ÷ one batch again and again", rates["fed"], rates["alone"]
    )


def evaluation(bench: Bench) -> None:
    """Codes and reconstructions of a batch, as at the end of training."""
    args = bench.args
    for name, (activation, objective) in kinds(args).items():
        if name == "Matryoshka":
            continue
        sae = bench.bank(activation, objective, 1, "reference").to_sae(0)
        found = bench.alternate(
            {"encode": per_second(lambda sae=sae: codes.encode(sae, bench.x), len(bench.x))}
        )
        bench.report.add(f"evaluation of {name}", found["encode"], "tokens/s")


def measuring(bench: Bench) -> None:
    """`saev inference`."""
    import inference

    args = argparse.Namespace(**vars(bench.args))
    args.labels, args.batch_size = 0, min(8192, args.batch)
    n_tokens = 4_000 if args.small else 400_000
    place = str(Path(bench.root) / "measuring")
    shards_url = write(place, inference.folder(n_tokens, args))
    runs = [inference.write_sae(place, shards_url, args, seed) for seed in range(args.n)]
    ways = {
        "encode, select and decode": inference.in_memory(
            shards_url, runs[0], args, lambda sae, x: codes.encode(sae, x)
        ),
        "inference, N = 1, statistics only": inference.stage(
            shards_url, runs[:1], args, save=False
        ),
        f"inference, N = {args.n}, statistics only": inference.stage(
            shards_url, runs, args, save=False
        ),
    }
    if args.small:
        del ways[f"inference, N = {args.n}, statistics only"]
    found = alternate(ways, 1, warm_up=not args.small)
    for name, values in found.items():
        bench.report.add(name, values, "SAE-tokens/s")
    limit, *stages = ways
    for name in stages:
        bench.report.share(f"{name} ÷ {limit}", found[name], found[limit], at_least=0.7)


def extraction(bench: Bench) -> None:
    """`saev shards` with ViT-L/14."""
    import extraction as module

    args = argparse.Namespace(**vars(bench.args))
    args.ckpt, args.image_size, args.pixels = "vit_large_patch14_dinov2", 224, 500
    args.n, args.layers, args.batch_size, args.dtype, args.amp = 512, [-1], 128, "bfloat16", True
    args.repeats = min(2, args.repeats)
    if args.small:
        args.ckpt, args.n, args.batch_size = "vit_tiny_patch16_224", 4, 4
    module.recording(bench.report, args, str(Path(bench.root) / "extraction"))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "limits": limits,
    "baseline": baseline,
    **{
        f"steps-{kind.lower()}": steps_of(kind)
        for kind in ("TopK", "Matryoshka", "BatchTopK", "ReLU")
    },
    "profile": profile,
    "skewed": skewed,
    "dead": dead,
    "narrow": narrow,
    "loader": loader,
    "evaluation": evaluation,
    "measuring": measuring,
    "extraction": extraction,
    "peers": peers,
}


# --- Processes ------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    """Do sections, and write a line when each begins and ends."""
    torch.set_float32_matmul_precision("high")
    with Path(args.child).open("a") as out:

        def say(record: dict[str, tp.Any]) -> None:
            out.write(json.dumps(record) + "\n")
            out.flush()

        bench = None
        for name in args.only:
            say({"begin": name})
            report = Report("")
            try:
                bench = bench or Bench(args, report, args.root)
                bench.report = report
                SECTIONS[name](bench)
            except Exception as err:
                traceback.print_exc()
                say({"why": first_line(err)})
                report.leave_out(name, first_line(err))
            try:
                gc.collect()
                synchronize()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            except RuntimeError as err:
                # Nothing works in this process any more.
                say({"why": first_line(err)})
                os._exit(1)
            say({"end": name, "rows": [row._asdict() for row in report.rows],
                 "left_out": report.left_out})  # fmt: skip


def run_sections(args: argparse.Namespace, report: Report, root: str) -> None:
    """Sections in processes, a new one after each that breaks. What is left then runs without
    Triton's kernels, from the section that broke."""
    kernels: list[str] = []
    left = list(args.only or SECTIONS)
    until = time.monotonic() + 60 * args.minutes
    patience = 10 * SECTION_SECONDS if args.small else SECTION_SECONDS  # the interpreter is slow
    lines = Path(root) / "rows.jsonl"
    while left:
        lines.write_text("")
        command = [sys.executable, __file__, *sys.argv[1:], "--root", root, "--child", str(lines)]
        process = subprocess.Popen([*command, *kernels, "--only", *left])
        why = _follow(process, lines, until, patience, report, left)
        if not left:
            break
        if time.monotonic() > until:
            for name in left:
                report.leave_out(name, f"no time was left of {args.minutes:g} minutes")
            break
        if args.no_kernels or kernels:
            report.leave_out(left.pop(0), why)
        else:
            report.leave_out(f"{left[0]} and what follows, with Triton's kernels", why)
            kernels = ["--no-kernels"]


def _follow(
    process: subprocess.Popen[bytes],
    lines: Path,
    until: float,
    patience: float,
    report: Report,
    left: list[str],
) -> str:
    """Take over rows until a process ends. What is done is removed from ``left``.

    Returns:
        Why the process ended.
    """
    n_read, began, why = 0, time.monotonic(), ""
    while True:
        ended = process.poll() is not None
        text = lines.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines()[n_read:]:  # whole lines
            n_read += 1
            began = time.monotonic()
            record = json.loads(line)
            why = record.get("why", why)
            if "end" in record:
                why = ""
                left.remove(record["end"])
                report.rows += [Row(**row) for row in record["rows"]]
                report.left_out += [tuple(pair) for pair in record["left_out"]]
        if ended:
            return why or f"its process ended with status {process.returncode}"
        if time.monotonic() > min(until, began + patience):
            why = f"it took more than {patience:g} seconds"
            process.kill()
            process.wait()
        time.sleep(0.2)


def main() -> None:
    """Run and print."""
    made = parser(tp.cast(str, __doc__), repeats=5)
    made.add_argument("--n", type=int, default=8, help="SAEs")
    made.add_argument("--d-model", type=int, default=1024)
    made.add_argument("--d-sae", type=int, default=16_384)
    made.add_argument("--top-k", type=int, default=32)
    made.add_argument("--batch", type=int, default=16_384)
    made.add_argument("--mb", type=float, default=2000, help="size of the loader's folder")
    made.add_argument("--threads", type=int, default=8, help="reader threads")
    made.add_argument("--minutes", type=float, default=8, help="after these, sections are left out")
    made.add_argument("--no-kernels", action="store_true", help="nothing with Triton's kernels")
    made.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="some sections"
    )
    made.add_argument("--device", default="cuda")
    made.add_argument("--root", default="", help="where to write; a temporary folder if not given")
    made.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        made.error("torch sees no CUDA GPU here. Use --device cpu --small for a trial.")
    if args.small:
        args.d_model, args.d_sae, args.batch, args.mb, args.n, args.top_k = 16, 32, 8, 0.2, 2, 4
        args.repeats, args.threads, args.minutes = 1, 2, 60.0
    if args.child:
        child(args)
        return
    report = Report(invocation(), args.json)
    with tempfile.TemporaryDirectory(prefix="saev-bench-", dir=args.root or None) as root:
        run_sections(args, report, root)
    report.close()


if __name__ == "__main__":
    main()
