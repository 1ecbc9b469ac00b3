"""Triton's kernels without a GPU: their results in the interpreter, and their machine code."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from saev.config import SaeConfig, TopK, Vanilla
from saev.errors import ConfigError
from saev.nn import SaeBank
from saev.nn.kernels.choice import Shape, use_triton
from saev.nn.kernels.sparse import Codes, group_by_latent

CPU = torch.device("cpu")
SHAPE = Shape(8, 20, 2, 1, False)


def release(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.slow
@needs_triton
def test_results_are_those_of_the_references() -> None:
    if release("triton") < (3, 8) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         Path(__file__).with_name("triton_cases.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr


SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Most shared memory of a program, by CUDA's table of compute capabilities."""


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here(monkeypatch) -> None:
    """As they are launched for 8 SAEs of 1024 → 16384, without registers that spill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launches = {}
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, **kwargs: launches.update({self: (args, kwargs)})
    )
    launch_all()

    def compiled(kernel, capability):
        args, kwargs = launches[kernel]
        names, options = kernel.arg_names, {"num_warps": kwargs["num_warps"]}
        signature, constants, aligned = {}, {}, {}
        for i, name in enumerate(names):
            if name in kwargs:
                signature[name], constants[(i,)] = "constexpr", kwargs[name]
            elif isinstance(args[i], torch.Tensor):
                signature[name] = f"*{SHORT[args[i].dtype]}"
                aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32"
        source = ASTSource(kernel, signature, constants, aligned)
        return triton.compile(source, GPUTarget("cuda", capability, 32), options)

    assert len(launches) == 6
    with ThreadPoolExecutor(2) as threads:
        jobs = {
            (kernel.__name__, c): threads.submit(compiled, kernel, c)
            for kernel in launches
            for c in SHARED_BYTES
        }
        for (name, capability), job in jobs.items():
            made = job.result()
            assert made.metadata.shared <= SHARED_BYTES[capability], name
            assert stack_bytes(made.asm["cubin"]) == 0, (name, capability)


SHORT = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"
}  # fmt: skip


def launch_all() -> None:
    """Call each kernel with tensors as they are on a GPU, but with few rows."""
    from saev.nn.kernels.triton import bags, decode, select, upkeep

    n, d_model, d_sae, k = 4, 1024, 16_384, 32
    select.top_k(
        torch.empty(n, 1, d_sae, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int32), k,
        same=False,
    )  # fmt: skip
    codes = Codes(
        torch.ones(n * k),
        torch.zeros(n * k, dtype=torch.int32),
        torch.arange(n + 1, dtype=torch.int32) * k,
    )
    table, x = torch.empty(64, d_model, dtype=torch.bfloat16), torch.empty(n, d_model)
    lengths = torch.full((1, 10), 64)
    decode.decode(codes, table, x[:1], x, lengths, torch.ones(1, 10), residual=True)
    wide = torch.empty(64, d_model)
    bags.add_bags(wide, table, group_by_latent(codes.latents, 64), codes.latents, codes.values)
    rows = wide[None]
    upkeep.remove_parallel(rows, rows, x[0])
    upkeep.update(rows, rows, rows, rows, x[:1])


def stack_bytes(cubin: bytes) -> int:
    """Bytes of a thread's stack, where registers go that spill: EIATTR_FRAME_SIZE of .nv.info."""
    import struct

    # An attribute is (format 4, kind 0x11, size 8, function, bytes), by NVIDIA's cuobjdump.
    found = re.findall(rb"\x04\x11\x08\x00(....)(....)", cubin, re.DOTALL)
    assert found
    return max(struct.unpack("<I", size)[0] for _, size in found)


def test_a_cpu_uses_torch() -> None:
    assert not use_triton("auto", CPU, SHAPE)
    assert not use_triton("reference", CPU, SHAPE)
    with pytest.raises(ConfigError, match=r"--kernels triton cannot .* --kernels auto"):
        use_triton("triton", CPU, SHAPE)


def test_a_bank_knows_its_kernels() -> None:
    cfg = SaeConfig(d_sae=16, activation=TopK(top_k=3))
    assert not SaeBank([cfg], [Vanilla()], [1e-3], [0], 8).triton
    with pytest.raises(ConfigError, match="--kernels triton"):
        SaeBank([cfg], [Vanilla()], [1e-3], [0], 8, kernels="triton")
