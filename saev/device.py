"""Which device a stage computes on."""

import torch

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
