"""The config of `saev shards`."""

import pydantic

from saev.config.base import Config, Dtype
from saev.config.images import ImageData


class ShardsConfig(Config):
    """Record ViT activations of an image dataset into sharded binary files."""

    shards_root: str = "./shards"
    """URL of the folder for the result, which is a folder named by its content hash. For object
    storage, a shard is first written to a scratch file in TMPDIR, which needs space for it."""
    family: str = "clip"
    """Model family: clip, siglip, timm, dinov2, dinov3, or one that you registered."""
    ckpt: str = "ViT-B-16/openai"
    """Checkpoint in the family's own naming (clip: ARCH/TAG or hf-hub:ORG/NAME; timm: a model
    name), ARCH/random for untrained weights, or ARCH@URL for weights in a file."""
    d_model: int | None = None
    """Width of the residual stream; read from the model if not given, checked if given."""
    layers: tuple[int, ...] = (-2,)
    """Blocks after which the residual stream is recorded; negative ones count from the end."""
    content_tokens_per_example: int | None = None
    """Patches per image; read from the model if not given, checked if given."""
    cls_token: bool = True
    """Record the class token too, if the model has one."""
    image_size: int | None = None
    """Input height and width in pixels; the model's own if not given."""
    max_tokens_per_shard: int = pydantic.Field(default=2_400_000, ge=1)
    """Most vectors (examples × tokens × layers) in one shard file."""
    dtype: Dtype = "float32"
    """Stored precision. float16 and bfloat16 halve the bytes that training has to read."""
    batch_size: int = pydantic.Field(default=256, ge=1)
    """Images per forward pass on a GPU. On the CPU there are always 8 per pass, and several passes
    run in parallel, so that the result does not depend on the number of threads."""
    n_workers: int = pydantic.Field(default=0, ge=0)
    """Threads that decode images; 0 means one per core."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
    amp: bool = False
    """Run the forward pass in bfloat16 autocast."""
    skip_unreadable: bool = False
    """Leave out images that cannot be decoded and list them in skipped.json."""
    part: str = ""
    """I/N: record only this part of the shards (1/N to N/N), and do not publish. Without --part,
    the command records what is missing and publishes."""
    data: ImageData
    """The images."""
