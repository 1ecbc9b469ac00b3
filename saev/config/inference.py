"""The config of `saev inference`."""

import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.loaders import DataConfig
from saev.config.many import ManySaes


class _Measuring(Config):
    """Settings of the measurement of an SAE."""

    added: tp.ClassVar = frozenset(
        {"allow_other_model", "centre", "image_floor", "npz", "scale", "top_k"}
    )

    data: DataConfig = DataConfig()
    """The activations; by default those that the run was trained on."""
    out: str = ""
    """URL of the folder for the results; by default RUN/inference/HASH."""
    n_dists: int = pydantic.Field(default=25, ge=0)
    """Latents whose values are kept in full, spread over the range of frequencies."""
    n_top: int = pydantic.Field(default=16, ge=1)
    """Examples kept per latent."""
    save: bool = True
    """Write the sparse codes of all tokens: the tables token_acts, and token_acts.npz (--no-save
    leaves them out)."""
    npz: bool = True
    """Beside the tables token_acts, write token_acts.npz, which SciPy opens (--no-npz leaves it
    out)."""
    image_floor: float = pydantic.Field(default=0.05, ge=0.0, lt=1.0)
    """Leave out of the tables image_acts the images on which a latent's largest value is below this
    share of its largest value of all. What is left out is counted, and no statistic lacks it."""
    concepts: bool = True
    """If tokens have labels, measure how well single latents predict the classes. While it runs,
    this needs storage for the codes of all tokens, also with --no-save."""
    batch_size: int = pydantic.Field(default=8192, ge=1)
    """Most tokens per step; fewer if the latents of a step would take much memory."""
    subtract_b_dec: bool = False
    """The SAE is a published sae.pt from before August 2025, whose encoder takes x - b_dec."""
    centre: str = ""
    """URL of the vector centre (.npy), for SAEs of other projects on (x - centre) · scale."""
    scale: float | None = pydantic.Field(default=None, gt=0.0)
    """The factor scale, for SAEs of other projects on (x - centre) · scale."""
    top_k: int | None = pydantic.Field(default=None, ge=1)
    """Latents kept per token, for state dicts that do not record it (overcomplete's TopKSAE)."""
    allow_other_model: bool = False
    """Measure the SAE even if the activations are of another model, preprocessing or image size
    than those that it was trained on. The result then says so."""
    part: str = ""
    """I/N: do only this part of the shards (1/N to N/N), and do not publish."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""


class InferenceConfig(_Measuring):
    """Run one SAE over all activations: metrics, statistics, sparse codes, top examples."""

    run: str
    """URL of the run folder (or of any SAE that saev.load_sae reads; then --out is needed)."""


class InferenceCommand(_Measuring, ManySaes):
    """Run SAEs over all activations: metrics, statistics, sparse codes, top examples.

    SAEs that read the same tokens read them once, together. The results of each are the same as
    when it is measured alone.
    """

    run: tuple[str, ...] = ()
    """URLs of run folders (or of one SAE that saev.load_sae reads; then --out is needed)."""

    def configs(self) -> list[InferenceConfig]:
        """The configs of all SAEs, without repetitions. Looks for SAEs in ``runs``.

        Raises:
            ConfigError: there are none in ``runs``, or a setting does not fit several SAEs.
        """
        settings = {k: v for k, v in self if k not in ManySaes.model_fields}
        return [InferenceConfig(run=run, **settings) for run in self.named("out")]
