"""The config of `saev visuals`."""

import typing as tp

import pydantic

from saev.config.base import Config
from saev.config.images import ImageData
from saev.config.many import ManySaes


class _Showing(Config):
    """Settings of the page of an SAE."""

    added: tp.ClassVar = frozenset({"allow_other_model", "max_pictures", "max_mb"})

    shards: str
    """URL of the shards folder that inference ran on."""
    inference: str = ""
    """URL of the inference folder; by default the one of this run and these shards."""
    out: str = ""
    """URL of the folder for the page and its pictures; by default INFERENCE/report."""
    latents: tuple[int, ...] = ()
    """Latents that are marked as chosen on the page. They have pictures in any case."""
    n_latents: int = pydantic.Field(default=20, ge=0)
    """Further latents to choose, spread over the range of frequencies."""
    n_top: int = pydantic.Field(default=8, ge=1)
    """Strongest images of each latent to store, beside those from the range of its values."""
    max_pictures: int = pydantic.Field(default=20_000, ge=0)
    """Images to store at most: first the strongest one of each latent, then the others of strong
    and rare latents. Those of chosen latents are stored in any case."""
    max_mb: float = pydantic.Field(default=15.0, gt=0, allow_inf_nan=False)
    """Size of the page in megabytes at most; as many pictures are in it as fit."""
    log_freq_range: tuple[float, float] = (-6.0, -1.0)
    """Range of log10(frequency) that the further latents are chosen from."""
    log_value_range: tuple[float, float] = (-2.0, 4.0)
    """Range of log10(mean value when active) that the further latents are chosen from."""
    image_size: int = pydantic.Field(default=256, ge=16)
    """Longer side of the stored images in pixels, or less if the model saw less."""
    seed: int = 0
    """Seed of the choice of further latents."""
    allow_other_model: bool = False
    """Show the SAE even if the activations are of another model, preprocessing or image size than
    those that it was trained on. The page then says so."""
    data: ImageData | None = None
    """The images, if they have moved since they were recorded or the shards do not say where they
    are (protocol 2.1); by default the dataset that the shards name."""


class VisualsConfig(_Showing):
    """Pictures of what the latents of one SAE respond to, and a page to explore them."""

    run: str
    """URL of the run folder."""


class VisualsCommand(_Showing, ManySaes):
    """Pictures of what latents respond to, and a page for each SAE to explore them.

    An image that several SAEs or latents show is decoded once. The page of each SAE is the same as
    when it is drawn alone.
    """

    def configs(self) -> list[VisualsConfig]:
        """The configs of all SAEs, without repetitions. Looks for SAEs in ``runs``.

        Raises:
            ConfigError: there are none in ``runs``, or a setting does not fit several SAEs.
        """
        settings = {k: v for k, v in self if k not in ManySaes.model_fields}
        given = self.named("inference", "out").values()
        return [VisualsConfig(run=run, **settings) for run in given]
