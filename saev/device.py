"""The device of a stage."""

import typing as tp

import torch
from torch import Tensor

from saev.errors import ConfigError


def choose_device(device: str) -> torch.device:
    """The device that a `--device` flag names; ``auto`` is a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).splitlines()[0]
        raise ConfigError(
            f"--device {device} cannot be used here ({reason}); expected auto, cpu, cuda or cuda:N."
        ) from err
    return chosen


def computes_in_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16 matrices."""
    # Older versions of torch lack the function.
    capabilities: dict[str, tp.Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def upload(values: tp.Any, like: Tensor) -> Tensor:
    """Numbers (or a tensor on the CPU) as a tensor with the dtype and device of another tensor.

    Unlike ``torch.tensor(values, device="cuda")``, this does not wait until the GPU has finished
    its queued work.
    """
    return torch.as_tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
