"""The configs of `saev inference` and `saev visuals`."""

import pydantic

from saev.config.base import Config
from saev.config.loaders import DataConfig


class InferenceConfig(Config):
    """Run one SAE over all activations: metrics, statistics, sparse codes, top examples."""

    run: str
    """URL of the run folder (or of any SAE that saev.load_sae reads)."""
    data: DataConfig = DataConfig()
    """The activations."""
    out: str = ""
    """URL of the folder for the results; by default RUN/inference/HASH."""
    n_dists: int = pydantic.Field(default=25, ge=0)
    """Latents whose values are kept in full."""
    n_top: int = pydantic.Field(default=16, ge=1)
    """Examples kept per latent."""
    save: bool = True
    """Write token_acts.npz, the sparse codes of all tokens (--no-save leaves it out)."""
    batch_size: int = pydantic.Field(default=8192, ge=1)
    """Tokens per step."""
    part: str = ""
    """I/N: do only that part of the shards (1/N to N/N), and do not finish."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""


class VisualsConfig(Config):
    """Pictures of what latents respond to, and a page to leaf through them."""

    run: str
    """URL of the run folder."""
    shards: str
    """URL of the shards folder that inference ran on."""
    inference: str = ""
    """URL of the inference folder; by default the one of this run and these shards."""
    out: str = ""
    """URL of the folder for the pictures; by default INFERENCE/report."""
    latents: tuple[int, ...] = ()
    """Latents to show in any case."""
    n_latents: int = pydantic.Field(default=20, ge=0)
    """Further latents, spread over the range of frequencies."""
    n_top: int = pydantic.Field(default=8, ge=1)
    """Images per latent."""
    log_freq_range: tuple[float, float] = (-6.0, -1.0)
    """Range of log10(frequency) that the further latents are chosen from."""
    log_value_range: tuple[float, float] = (-2.0, 4.0)
    """Range of log10(mean value when active) that the further latents are chosen from."""
    image_size: int = pydantic.Field(default=256, ge=16)
    """Height and width of the pictures in pixels."""
    seed: int = 0
    """What the choice of further latents is drawn from."""
