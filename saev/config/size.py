"""The config of `saev size`."""

import typing as tp

import pydantic
import tyro

from saev.config.base import Config, Dtype
from saev.config.images import ImageData
from saev.config.named import ConfigFile

Count = tp.Annotated[int, pydantic.Field(ge=1)]
Rate = tp.Annotated[float, pydantic.Field(gt=0)]


class SizeConfig(Config):
    """Estimate storage, reading and memory of a job before it is started.

    Describe the job by flags, or by the file of `saev run --config`. Flags override the file.
    """

    config: ConfigFile = ""
    """Name of a config, or URL of a file, as for `saev run --config`."""
    n_images: Count | None = None
    """Number of images; counted if a dataset is given (by data:… or the file's [data] table)."""
    model: str = ""
    """A model by its short name, such as clip-vitb16; --model list prints all."""
    family: str | None = None
    """Model family, as for `saev shards`; together with --ckpt."""
    ckpt: str | None = None
    """Checkpoint, as for `saev shards`. Only its architecture matters."""
    image_size: Count | None = None
    """Input height and width in pixels; the model's own if not given."""
    load_model: bool = False
    """Build the model with random weights to learn its sizes, if it is not in the list. Needs
    torch."""
    d_model: Count | None = None
    """Width of the residual stream, instead of a model."""
    content_tokens_per_example: Count | None = None
    """Patches per image, instead of a model."""
    layers: Count | None = None
    """Number of layers that are recorded."""
    cls_token: bool = True
    """Record the class token too, if the model has one."""
    labels: bool = False
    """Whether the images have masks, so that every patch has a label."""
    dtype: Dtype | None = None
    """Stored precision."""
    max_tokens_per_shard: Count | None = None
    """Most vectors in one shard file."""
    n_train: Count | None = None
    """Tokens to train on."""
    n_saes: Count = 1
    """Number of SAEs, trained on the same batches. With a file, its sweep decides."""
    d_sae: Count | None = None
    """Latents of an SAE; 16 × d_model by default."""
    top_k: Count | None = None
    """Active latents per token, also for activations without top_k."""
    batch_size: Count | None = None
    """Tokens per training step."""
    buffer_mb: Rate | None = None
    """Memory for the windows in which rows are shuffled, in MiB."""
    max_parts: Count = 16
    """Most pods that record at once."""
    images_per_second: Rate | None = None
    """Measured speed of recording on one GPU; adds hours."""
    tokens_per_second: Rate | None = None
    """Measured speed of training one group; adds hours."""
    gb_per_second: Rate | None = None
    """Measured speed of reading from the storage; adds hours."""
    as_json: tp.Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of tables."""
    data: ImageData | None = None
    """The images, to count them."""
