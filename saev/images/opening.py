"""Opens datasets of all kinds."""

import typing as tp

from saev.config.images import (
    Cifar10,
    FakeImg,
    FakeImgSeg,
    ImageData,
    Imagenet,
    ImgFolder,
    ImgSegFolder,
)
from saev.images.datasets import ImageDataset
from saev.images.fake import Fake, FakeSegmentation
from saev.images.folders import Folder, SegFolder
from saev.images.hub import HubDataset


def open_dataset(cfg: ImageData) -> ImageDataset:
    """Open the dataset of a config. This lists the dataset and reads no image.

    Raises:
        StorageError: a folder is missing, unreadable, empty or not a folder.
        ConfigError: the config does not fit the data, or a package is not installed.
    """
    match cfg:
        case ImgSegFolder():
            return SegFolder(cfg)
        case ImgFolder():
            return Folder(cfg)
        case Imagenet() | Cifar10():
            return HubDataset(cfg)
        case FakeImgSeg():
            return FakeSegmentation(cfg)
        case FakeImg():
            return Fake(cfg)
        case _:
            tp.assert_never(cfg)
