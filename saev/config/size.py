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
    """How much storage, reading and memory a job takes, before it is started.

    Say what is recorded and trained by flags, or by the file of `saev run --config`; flags win.
    """

    config: ConfigFile = ""
    """What `saev run --config` takes: a name, or the URL of a file."""
    n_images: Count | None = None
    """Images; counted if a dataset is named (by data:… or the file's [data] table)."""
    model: str = ""
    """A model by its short name, such as clip-vitb16; --model list prints all."""
    family: str | None = None
    """Model family, as for `saev shards`; together with --ckpt."""
    ckpt: str | None = None
    """Checkpoint, as for `saev shards`. Only its architecture matters."""
    image_size: Count | None = None
    """Input height and width in pixels; the model's own if not given."""
    load_model: bool = False
    """Build the model, with random weights, and ask it for its sizes: for models that are not in
    the list. Needs torch."""
    d_model: Count | None = None
    """Width of the residual stream, in place of a model."""
    content_tokens_per_example: Count | None = None
    """Patches per image, in place of a model."""
    layers: Count | None = None
    """How many layers are recorded."""
    cls_token: bool = True
    """Record the class token too, if the model has one."""
    labels: bool = False
    """The images have masks, so that every patch gets a label."""
    dtype: Dtype | None = None
    """Stored precision."""
    max_tokens_per_shard: Count | None = None
    """Most vectors in one shard file."""
    n_train: Count | None = None
    """Tokens to train on."""
    n_saes: Count = 1
    """SAEs of that kind, trained on the same batches; a file's sweep says it itself."""
    d_sae: Count | None = None
    """Latents of an SAE; 16 × d_model by default."""
    top_k: Count | None = None
    """Active latents per token, also for activations that do not fix it."""
    batch_size: Count | None = None
    """Tokens per training step."""
    buffer_mb: Rate | None = None
    """Memory for the windows that rows are shuffled in, in MiB."""
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
