"""The config of `saev inference`."""

import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.loaders import DataConfig


class InferenceConfig(Config):
    """Run one SAE over all activations: metrics, statistics, sparse codes, top examples."""

    added: tp.ClassVar = frozenset({"allow_other_model", "centre", "scale", "top_k"})

    run: str
    """URL of the run folder (or of any SAE that saev.load_sae reads; then --out is needed)."""
    data: DataConfig = DataConfig()
    """The activations; by default those that the run was trained on."""
    out: str = ""
    """URL of the folder for the results; by default RUN/inference/HASH."""
    n_dists: int = pydantic.Field(default=25, ge=0)
    """Latents whose values are kept in full, spread over the range of frequencies."""
    n_top: int = pydantic.Field(default=16, ge=1)
    """Examples kept per latent."""
    save: bool = True
    """Write token_acts.npz, the sparse codes of all tokens (--no-save leaves it out)."""
    concepts: bool = True
    """Where tokens have labels, measure how well single latents tell the classes. Takes room for
    the codes of all tokens while it runs, with --no-save too."""
    batch_size: int = pydantic.Field(default=8192, ge=1)
    """Most tokens per step; fewer where the latents of a step would take much memory."""
    subtract_b_dec: bool = False
    """The SAE is a published sae.pt from before August 2025, whose encoder saw x - b_dec."""
    centre: str = ""
    """URL of the vector centre (.npy), for SAEs of other projects that saw (x - centre) · scale."""
    scale: float | None = pydantic.Field(default=None, gt=0.0)
    """The factor scale, for SAEs of other projects that saw (x - centre) · scale."""
    top_k: int | None = pydantic.Field(default=None, ge=1)
    """Latents kept per token, for state dicts that do not record it (overcomplete's TopKSAE)."""
    allow_other_model: bool = False
    """Measure the SAE even if the activations are of another model, preprocessing or image size
    than those that it was trained on. The result then says so."""
    part: str = ""
    """I/N: do only that part of the shards (1/N to N/N), and do not finish."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
