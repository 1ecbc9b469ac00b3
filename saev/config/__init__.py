"""Configs of all stages. They do not import torch, so that pipeline definitions can use them."""

from saev.config.base import Config, Dtype, Tokens
from saev.config.images import (
    Cifar10,
    FakeImg,
    FakeImgSeg,
    ImageData,
    Imagenet,
    ImgFolder,
    ImgSegFolder,
)
from saev.config.inference import InferenceCommand, InferenceConfig
from saev.config.loaders import DataConfig, LoaderConfig, ValDataConfig
from saev.config.sae import (
    Activation,
    BatchTopK,
    JumpRelu,
    Matryoshka,
    Objective,
    Relu,
    SaeConfig,
    TopK,
    Vanilla,
)
from saev.config.shards import ShardsConfig
from saev.config.train import TrainConfig
from saev.config.visuals import VisualsCommand, VisualsConfig

__all__ = [
    "Activation",
    "BatchTopK",
    "Cifar10",
    "Config",
    "DataConfig",
    "Dtype",
    "FakeImg",
    "FakeImgSeg",
    "ImageData",
    "Imagenet",
    "ImgFolder",
    "ImgSegFolder",
    "InferenceCommand",
    "InferenceConfig",
    "JumpRelu",
    "LoaderConfig",
    "Matryoshka",
    "Objective",
    "Relu",
    "SaeConfig",
    "ShardsConfig",
    "Tokens",
    "TopK",
    "TrainConfig",
    "ValDataConfig",
    "Vanilla",
    "VisualsCommand",
    "VisualsConfig",
]
