"""The format of a shards folder: metadata, file names, and the offset of each vector.

Protocol 3.0 is saev's own. Protocol 2.1, of the published saev, can be read. Both are a
:class:`Layout` with different strides. This module is arithmetic, except for :meth:`Metadata.read`.
"""

import dataclasses
import math
import typing as tp

import numpy as np
import pydantic

from saev import storage
from saev.config.base import Config, Dtype, FileName, Tokens
from saev.config.source import ActivationSource
from saev.errors import CorruptDataError

METADATA = "metadata.json"
SHARDS = "shards.json"
FILES = "files.json"
"""Lists size and checksums of all objects but the activations, which shards.json lists. It is
published just before shards.json."""
LABELS = "labels.bin"
EXAMPLES = "examples.parquet"
STATS = "stats.safetensors"
CHECKSUMS = "checksums.bin"
SKIPPED = "skipped.json"
PARTS = "parts"
"""Folder of the records of finished shards. It is deleted when the result is published."""

REMEDY = (
    "Restore it from a copy, or delete the folder and run the same `saev shards` command again."
)
"""What to do about damage."""

HASH_DIGITS = 16
ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


RANDOM = "/random"
"""Suffix of the name of a network with untrained weights."""


class Metadata(Config):
    """Metadata of a recording. The folder's name is a hash of all keys that affect activations."""

    added: tp.ClassVar = frozenset({"network", "weights", "structure", "versions"})

    protocol: tp.Literal["3.0", "2.1"] = "3.0"
    """Version of the format."""
    family: str
    """Model family."""
    ckpt: str
    """Checkpoint, in the family's naming."""
    ckpt_checksum: str | None = None
    """Checksum of the weights file, if the checkpoint names one."""
    network: str | None = None
    """Name of the network, which does not depend on the location of its weights. It ends in
    ``/random`` if the weights are untrained. None in recordings of version 0.1.0."""
    weights: str | None = None
    """SHA-256 over the names, shapes and values of the network's tensors. None in recordings of
    version 0.1.0 and of other programs."""
    structure: str | None = None
    """SHA-256 over the network's modules and their attributes, without its tensors. It shows that
    two names mean the same network. Not part of the identity."""
    versions: dict[str, str] = pydantic.Field(default_factory=dict)
    """Versions of libraries at recording, for information. Not part of the identity."""
    layers: tuple[int, ...]
    """Blocks whose output was recorded, in file order."""
    content_tokens_per_example: int = pydantic.Field(ge=0)
    """Patches per image."""
    cls_token: bool
    """Whether the class token was recorded, before the content tokens."""
    d_model: int = pydantic.Field(ge=1)
    """Width of one vector."""
    n_examples: int = pydantic.Field(ge=0)
    """Images in the dataset. shards.json counts recorded images; some may have been skipped."""
    max_tokens_per_shard: int = pydantic.Field(ge=1)
    """Most vectors in one shard."""
    image_size: tuple[int, int] | None = None
    """Model input height and width in pixels."""
    grid: tuple[int, int] | None = None
    """Rows and columns of content tokens."""
    image_spec: dict[str, tp.Any] | None = None
    """Preprocessing of images: the fields of `saev.images.transforms.ImageSpec` as JSON, so that
    drawing pictures needs no model."""
    amp: bool = False
    """Whether the forward pass ran in bfloat16 autocast."""
    skip_unreadable: bool = False
    """Whether images that could not be decoded were left out."""
    data: tp.Any
    """The image dataset's config as JSON. In protocol 2.1 a base64 pickle, kept as opaque text."""
    data_digest: str | None = None
    """SHA-256 over the names and sizes of the dataset's files."""
    dataset: str = ""
    """Location of the images."""
    pixel_agg: str | None = None
    """How mask pixels became token labels, for segmentation datasets."""
    dtype: Dtype = "float32"
    """Stored precision, little-endian."""

    def identity(self) -> dict[str, tp.Any]:
        """All keys that affect the activations, without the locations of images and weights.

        Images are identified by `data_digest` (their names and sizes), the model by `network` and
        `weights`. Untrained weights are identified by the network's name alone, because their last
        bits depend on the kind of processor.

        If the weights are unknown, the identity is that of version 0.1.0, which includes locations.
        """
        plain = super().identity()
        for key in ("structure", "versions"):
            plain.pop(key, None)
        if self.weights is None:
            return plain
        for key in ("ckpt", "ckpt_checksum", "dataset", *(["weights"] if self.is_random else [])):
            del plain[key]
        plain["data"] = without_place(plain["data"])
        return plain

    @property
    def hash(self) -> str:
        """Name of the folder: a prefix of the SHA-256 of the canonical JSON of the identity."""
        return storage.content_hash(self.identity(), HASH_DIGITS)

    def source(self, layer: int | None = None, tokens: Tokens | None = None) -> ActivationSource:
        """Description of the activations of a layer, for runs and results."""
        return ActivationSource(
            family=self.family,
            ckpt=self.ckpt,
            ckpt_checksum=self.ckpt_checksum,
            network=self.network,
            weights=self.weights,
            structure=self.structure,
            image_size=self.image_size,
            image_spec=self.image_spec,
            layer=layer,
            tokens=tokens,
            dtype=self.dtype,
            amp=self.amp if self.protocol == "3.0" else None,
            versions=self.versions,
            shards=self.hash,
        )

    @property
    def is_random(self) -> bool:
        """Whether the weights are untrained."""
        return (self.network or self.ckpt).endswith(RANDOM)

    @property
    def tokens_per_example(self) -> int:
        """Content tokens, plus the class token if it was recorded."""
        return self.content_tokens_per_example + int(self.cls_token)

    @property
    def examples_per_shard(self) -> int:
        """Examples in every shard but the last."""
        per_example = max(1, self.tokens_per_example * len(self.layers))
        return max(1, self.max_tokens_per_shard // per_example)

    @property
    def n_shards(self) -> int:
        """Shards that hold `n_examples` examples."""
        return math.ceil(self.n_examples / self.examples_per_shard)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and last + 1 dataset index of a shard."""
        start = shard * self.examples_per_shard
        return start, min(start + self.examples_per_shard, self.n_examples)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of content tokens. A square is assumed if they were not recorded."""
        if self.grid is not None:
            return self.grid
        side = math.isqrt(self.content_tokens_per_example)
        if side * side != self.content_tokens_per_example:
            return 1, self.content_tokens_per_example
        return side, side

    @classmethod
    def read(cls, url: str, folder: storage.Folder | None = None) -> "Metadata":
        """Metadata of a shards folder of either protocol.

        Args:
            url: the folder.
            folder: the opened folder, if its manifest was read already.

        Raises:
            CorruptDataError: the metadata are damaged, or the folder's name is another hash.
        """
        place = storage.join(url, METADATA)
        if folder is None and storage.exists(storage.join(url, FILES)):
            folder = storage.Folder.open(url, FILES, REMEDY)
        raw = storage.read_json(place) if folder is None else folder.read_json(METADATA)
        found = raw.get("protocol") if isinstance(raw, dict) else None
        if found not in ("3.0", "2.1"):
            raise CorruptDataError(f"{place}: protocol is {found!r}, expected '3.0' or '2.1'.")
        if found == "2.1":
            raw = _from_2_1(raw)
        metadata = cls.from_dict(raw, source=place, stored=True)
        name = storage.name(url)
        if found == "3.0" and is_hash(name) and name != metadata.hash:
            raise CorruptDataError(
                f"{place} does not belong to its folder: its hash is {metadata.hash}, "
                f"the folder is named {name}. It was edited or damaged; record again."
            )
        return metadata


def is_hash(name: str) -> bool:
    """Whether a folder's name has the form of :attr:`Metadata.hash`."""
    return len(name) == HASH_DIGITS and set(name) <= set("0123456789abcdef")


def without_place(data: tp.Any) -> tp.Any:
    """A dataset's config as JSON, without the locations of the dataset and its map of labels."""
    if not isinstance(data, dict):
        return data
    places = ["root", "mask_map", *(["name"] if is_place(data.get("name")) else [])]
    return {key: value for key, value in data.items() if key not in places}


def is_place(name: tp.Any) -> bool:
    """Whether the name of a dataset is a URL or a path, and not a name on a hub."""
    return isinstance(name, str) and ("://" in name or name.startswith(("/", ".", "~")))


def _from_2_1(raw: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """Convert metadata of protocol 2.1: rename keys of early writers, and drop unknown keys."""
    renamed = {
        "vit_family": "family",
        "vit_ckpt": "ckpt",
        "d_vit": "d_model",
        "n_imgs": "n_examples",
        "n_patches_per_img": "content_tokens_per_example",
        "max_patches_per_shard": "max_tokens_per_shard",
    }
    known = {renamed.get(key, key): value for key, value in raw.items()}
    return {key: value for key, value in known.items() if key in Metadata.model_fields}


@pydantic.dataclasses.dataclass(frozen=True, slots=True, config={"extra": "forbid"})
class ShardInfo:
    """One row of shards.json. It is not a :class:`Config`, because there may be a hundred thousand
    rows, and each pydantic model is three objects for Python's garbage collector."""

    name: FileName
    """File name."""
    n_examples: int = pydantic.Field(ge=0)
    """Examples in the file."""
    n_bytes: int | None = None
    """Size of the file (protocol 3.0)."""
    checksum: str | None = None
    """CRC-32C of the file (protocol 3.0)."""

    def to_dict(self) -> dict[str, tp.Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"acts{shard:06d}.bin"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of vectors in a shard file. Strides are in vectors of d_model elements."""

    n_examples: int
    """Examples in the file."""
    n_layers: int
    """Layers in the file."""
    tokens: int
    """Tokens per example."""
    d_model: int
    """Width of a vector."""
    itemsize: int
    """Bytes per element."""
    layer_stride: int
    """Bytes from one layer to the next."""
    example_stride: int
    """From one example to the next, in one layer."""

    @classmethod
    def of(cls, metadata: Metadata, n_examples: int) -> "Layout":
        """Layout of a shard that holds ``n_examples`` examples."""
        n_layers, tokens = len(metadata.layers), metadata.tokens_per_example
        if metadata.protocol == "3.0":  # [layer, example, token, d_model]
            layer_stride, example_stride = n_examples * tokens, tokens
        else:  # [example, layer, token, d_model]
            layer_stride, example_stride = tokens, n_layers * tokens
        return cls(
            n_examples, n_layers, tokens, metadata.d_model, ITEMSIZE[metadata.dtype],
            layer_stride, example_stride,
        )  # fmt: skip

    @property
    def row_bytes(self) -> int:
        """Bytes of one example in one layer."""
        return self.tokens * self.d_model * self.itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of all examples, without padding."""
        return self.n_examples * self.n_layers * self.row_bytes

    @property
    def contiguous(self) -> bool:
        """Whether consecutive examples of one layer are adjacent."""
        return self.example_stride == self.tokens

    def offset(self, layer_index: int, example: int, token: int = 0) -> int:
        """Byte offset of a vector."""
        vectors = layer_index * self.layer_stride + example * self.example_stride + token
        return vectors * self.d_model * self.itemsize


def in_validation(example_idx: np.ndarray, fraction: float) -> np.ndarray:
    """Mask of the examples on the validation side of a split by example.

    The side of an example depends only on a hash of its index (the finaliser of MurmurHash3, public
    domain).

    Args:
        example_idx: integers [n].
        fraction: share on the validation side, in [0, 1).

    Returns:
        bool [n].
    """
    h = np.asarray(example_idx).astype(np.uint64)
    h = (h ^ (h >> np.uint64(33))) + np.uint64(0x9E3779B97F4A7C15)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = h * np.uint64(multiplier)
        h = h ^ (h >> np.uint64(33))
    return h < np.uint64(int(fraction * 2**64))
