"""The config of `saev look`."""

import typing as tp

import pydantic
import tyro

from saev.config.base import Config, refuse
from saev.config.images import MAX_PIXELS


class LookConfig(Config):
    """Print which latents fire on images of your own; of several images, which latents they share.

    The images go through the model as those of the dataset did. The first image takes some seconds,
    because the model is loaded.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """URLs of image files."""
    run: str = ""
    """URL of the run folder (or of any SAE that saev.load_sae reads; then --shards is needed)."""
    shards: str = ""
    """URL of the shards folder whose recording is repeated; by default that of training, which need
    not exist any more."""
    ckpt: str = ""
    """Where the model's weights are now, if they have moved, such as vits14@URL."""
    layer: int | None = None
    """Block number, if neither the run nor the shards decide it."""
    n: int = pydantic.Field(default=12, ge=1)
    """Most latents in a list."""
    max_pixels: int = pydantic.Field(default=MAX_PIXELS, ge=1)
    """Most pixels of an image."""
    allow_other_model: bool = False
    """Look even if the shards are of another model, preprocessing or image size than those that the
    SAE was trained on."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
    as_json: tp.Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of tables, with all latents that fire."""

    @pydantic.model_validator(mode="after")
    def _is_complete(self) -> tp.Self:
        if not self.images:
            refuse("Name an image file")
        if not self.run:
            refuse("Say of which SAE with --run URL")
        return self
