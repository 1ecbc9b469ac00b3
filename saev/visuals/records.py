"""What the pictures of one latent say about themselves: latents/NNNNNN/latent.json."""

import typing as tp

import pydantic

from saev.config.base import Config

LATENTS = "latents"
RECORD = "latent.json"
DONE = "visuals.json"
"""Of a report. Written last; its presence means that the report is complete."""

PictureName = tp.Annotated[
    str, pydantic.Field(pattern=r"^[0-9]{2,9}-(plain|highlight|segmentation)\.webp$")
]
"""File name of a picture beside the record. No other kind of file and no other folder fits."""


class ClassShare(Config):
    """A class and how much of something it makes up."""

    hides_keys: tp.ClassVar = True

    label: int
    """The class as the mask has it."""
    name: str
    """Its name, or its number where it has none."""
    share: float
    """0 to 1."""


class ExamplePictures(Config):
    """One of a latent's top images."""

    hides_keys: tp.ClassVar = True

    rank: int
    """0 is the image with the highest value."""
    example: int
    """Row of the shards' examples."""
    index: int
    """Index in the dataset."""
    name: str
    """File name or key of the image; empty if it was not recorded."""
    label: str
    """Class of the image; empty if it has none."""
    value: float
    """Highest value of the latent on the image's patches."""
    n_firing: int
    """Patches on which it fires."""
    n_patches: int
    """Patches of the image."""
    firing_label: str = ""
    """Class of the patch with the highest value; empty without token labels."""
    plain: PictureName
    """File name of the picture as the model saw it."""
    highlight: PictureName
    """File name of the picture with the firing patches highlighted."""
    segmentation: PictureName | None = None
    """File name of the picture with its classes; None if there are none."""
    classes: tuple[ClassShare, ...] = ()
    """Classes in the picture, the largest first, as shares of its pixels."""
    height: int
    """Of the pictures, in pixels."""
    width: int
    """Of the pictures, in pixels."""


class Histogram(Config):
    """Counts in bins of equal width."""

    low: float
    """Lower edge of the first bin."""
    high: float
    """Upper edge of the last bin."""
    counts: tuple[int, ...]
    """Per bin."""
    source: str
    """What was counted, in words."""


class LatentRecord(Config):
    """One latent: its numbers and its pictures."""

    hides_keys: tp.ClassVar = True

    key: str
    """Hash of everything that the pictures depend on; another key means that they are stale."""
    latent: int = pydantic.Field(ge=0)
    """Its number."""
    frequency: float
    """Share of tokens on which it fires."""
    mean_value: float | None
    """Mean value where it fires; None if it never does."""
    max_value: float
    """Highest value over the dataset."""
    values: Histogram | None = None
    """Values where it fires."""
    examples: tuple[ExamplePictures, ...] = ()
    """Its top images."""

    @property
    def dead(self) -> bool:
        """Whether it never fired."""
        return self.frequency == 0


def folder_name(latent: int) -> str:
    """Of a latent's folder, relative to the report."""
    return f"{LATENTS}/{latent:06d}"
