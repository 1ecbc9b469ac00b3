"""Configs of image datasets, one per kind."""

import typing as tp

import pydantic
import tyro

from saev.config.base import Config

_T = tp.TypeVar("_T")
Kind = tp.Annotated[_T, tyro.conf.Suppress]
"""A key that is no flag: the subcommand chooses the kind on the command line."""

MAX_PIXELS = 178_956_970
"""Most pixels that PIL decodes by default: 2**30 / 6. PIL treats a larger image as an attack."""

PixelAgg = tp.Literal["majority", "prefer-fg"]


class ImgFolder(Config):
    """A folder of images; sub-folders, if there are any, are the classes.

    Images are found by their suffix at any depth; names that start with a dot are left out. The
    order is that of their paths below the root.
    """

    added: tp.ClassVar[frozenset[str]] = frozenset({"max_pixels", "heic"})

    kind: Kind[tp.Literal["img-folder"]] = "img-folder"
    root: str
    """URL of the folder, or a glob pattern of folders or images (quote it). Classes are paths
    of sub-folders below a matched folder or, for matched images, below the pattern's part without
    `*`."""
    version: str = ""
    """Any text that is part of the data's identity, besides names and sizes. Change it when files
    are replaced by others with the same names and sizes."""
    max_pixels: int = pydantic.Field(default=MAX_PIXELS, ge=1)
    """Most pixels of an image. A larger image counts as unreadable, because a small file may claim
    to be enormous. All decoding threads together hold at most this number of pixels, or 16 million
    per thread if that is more."""
    heic: bool = False
    """Whether .heic, .heif and .hif files are read (`pip install 'saevit[heic]'`). If not, they are
    left out, whether that package is installed or not."""


class ImgSegFolder(Config):
    """Images with pixel masks: ROOT/images/SPLIT/… and ROOT/annotations/SPLIT/… (same stems).

    Classes of whole images, if wanted, are read from ROOT/labels.csv (a header `stem,label`; with
    several label columns the one called `label`, else the first) or from ADE20K's
    ROOT/sceneCategories.txt (lines `STEM LABEL`).
    """

    added: tp.ClassVar[frozenset[str]] = frozenset(
        {"max_pixels", "heic", "mask_map", "mask_orientation"}
    )

    kind: Kind[tp.Literal["img-seg-folder"]] = "img-seg-folder"
    root: str
    """URL of the folder that holds `images` and `annotations`."""
    split: str = "training"
    """Sub-folder of `images` and `annotations`."""
    pixel_agg: PixelAgg = "majority"
    """How the mask pixels under a token become its label: the most frequent value (ties to the
    lowest), or the most frequent value that is not `bg_label` if there is any (prefer-fg)."""
    bg_label: int = pydantic.Field(default=0, ge=0, le=255)
    """The mask value of background, for `prefer-fg`."""
    version: str = ""
    """As for img-folder."""
    mask_map: str = ""
    """Map from colours or values of masks to labels: a CSV file (see docs/guide.md), or an image
    whose palette has the colours. A URL, or a path below `root`. Needed for colour masks and for
    values above 255."""
    mask_orientation: tp.Literal["displayed", "stored"] | None = None
    """Orientation of a mask without EXIF orientation if its photograph has one: as the picture is
    displayed, or as its pixels are stored. By default as displayed, with a warning."""
    max_pixels: int = pydantic.Field(default=MAX_PIXELS, ge=1)
    """As for img-folder."""
    heic: bool = False
    """As for img-folder."""


class Imagenet(Config):
    """ImageNet-1k, or another image classification dataset, through Hugging Face `datasets`."""

    added: tp.ClassVar[frozenset[str]] = frozenset({"max_pixels", "heic"})

    kind: Kind[tp.Literal["imagenet"]] = "imagenet"
    name: str = "ILSVRC/imagenet-1k"
    """Dataset name on the hub, a local folder that `datasets.load_dataset` opens, or the URL of a
    folder that `Dataset.save_to_disk` wrote."""
    split: str = "train"
    """Split name."""
    max_pixels: int = pydantic.Field(default=MAX_PIXELS, ge=1)
    """As for img-folder."""
    heic: bool = False
    """As for img-folder."""


class Cifar10(Config):
    """CIFAR-10 through Hugging Face `datasets`."""

    added: tp.ClassVar[frozenset[str]] = frozenset({"max_pixels", "heic"})

    kind: Kind[tp.Literal["cifar10"]] = "cifar10"
    name: str = "uoft-cs/cifar10"
    """Dataset name on the hub, a local folder that `datasets.load_dataset` opens, or the URL of a
    folder that `Dataset.save_to_disk` wrote."""
    split: str = "train"
    """Split name."""
    max_pixels: int = pydantic.Field(default=MAX_PIXELS, ge=1)
    """As for img-folder."""
    heic: bool = False
    """As for img-folder."""


class FakeImg(Config):
    """Generated images, for tests and dry runs of a cluster."""

    kind: Kind[tp.Literal["fake-img"]] = "fake-img"
    n_examples: int = pydantic.Field(default=10, ge=1)
    """Number of images."""
    n_classes: int = pydantic.Field(default=3, ge=1)
    """Number of class labels."""
    image_size: int = pydantic.Field(default=64, ge=1)
    """Height and width in pixels."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Seed of the pixels."""


class FakeImgSeg(FakeImg):
    """Generated images with masks, for tests and dry runs of a cluster."""

    kind: Kind[tp.Literal["fake-img-seg"]] = "fake-img-seg"  # type: ignore[assignment]
    pixel_agg: PixelAgg = "majority"
    """As for img-seg-folder."""
    bg_label: int = pydantic.Field(default=0, ge=0, le=255)
    """The mask value of background, for `prefer-fg`."""


ImageData = tp.Annotated[
    ImgFolder | ImgSegFolder | Imagenet | Cifar10 | FakeImg | FakeImgSeg,
    pydantic.Field(discriminator="kind"),
]
