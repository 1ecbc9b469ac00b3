"""The description of activations that is stored with SAEs and results, and its comparison."""

import logging
import typing as tp

import pydantic

from saev.config.base import Config, Dtype, Tokens
from saev.errors import ConfigError
from saev.once import say_once

logger = logging.getLogger(__name__)


class ActivationSource(Config):
    """The model, preprocessing, layer and tokens of activations.

    None means unknown, because earlier versions and other programs recorded less.
    """

    model_config = pydantic.ConfigDict(extra="ignore")  # keys of a later version
    hides_keys: tp.ClassVar = True

    family: str | None = None
    """Model family."""
    ckpt: str | None = None
    """Checkpoint, in the family's naming."""
    ckpt_checksum: str | None = None
    """Checksum of the weights file, if the checkpoint names one."""
    network: str | None = None
    """Name of the network, which does not depend on the location of its weights."""
    weights: str | None = None
    """Checksum of the network's tensors."""
    structure: str | None = None
    """Checksum of the network's structure, without its tensors."""
    image_size: tuple[int, int] | None = None
    """Model input height and width in pixels."""
    image_spec: dict[str, tp.Any] | None = None
    """Preprocessing of images."""
    layer: int | None = None
    """Block number."""
    tokens: Tokens | None = None
    """Which tokens of every example."""
    dtype: Dtype | None = None
    """Stored precision."""
    amp: bool | None = None
    """Whether the forward pass ran in bfloat16 autocast."""
    versions: dict[str, str] = pydantic.Field(default_factory=dict)
    """Versions of libraries at recording, for information. They are never compared."""
    shards: str | None = None
    """Hash of the shards folder's metadata."""

    @property
    def model(self) -> str:
        """Short name of the model, without the location of its weights."""
        arch, _, weights = (self.ckpt or "an unknown checkpoint").partition("@")
        name = f"{arch}@{weights.rstrip('/').rpartition('/')[2]}" if weights else arch
        return f"{self.family or 'unknown family'} {name}"

    @property
    def described(self) -> str:
        """A sentence with all facts that are of interest to a person."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        parts = [
            _identified(self),
            f"images of {_size(self)} pixels" if self.image_size else "",
            f"{self.dtype}{' from bfloat16 autocast' if self.amp else ''}" if self.dtype else "",
            f"recorded with {versions}" if versions else "",
        ]
        return f"{', '.join(filter(None, parts))}."

    def filled(self, other: "ActivationSource") -> "ActivationSource":
        """A copy in which unknown keys have the values of ``other``."""
        mine = {k: v for k, v in self if v is not None and v != {}}
        return other.model_copy(update=mine)


class Differences(tp.NamedTuple):
    """Differences between two sources, in words that name both sides."""

    refused: list[str]
    """Differences that make it meaningless to use an SAE of one source on the other."""
    warned: list[str]
    """Differences that may be intended, as ends of a sentence."""


def compare(trained: ActivationSource, used: ActivationSource) -> Differences:
    """Compare the activations of training with others. Unknown keys are not compared.

    Precision and versions of libraries are not compared, because they change activations by less
    than an SAE notices. They are recorded and shown.
    """
    refused = []
    if not _same_model(trained, used) and not _same_name_of_other_size(trained, used):
        model = f"model {_identified(trained)} in training, {_identified(used)} here"
        if _is_equal(trained.weights, used.weights) and not _is_random(trained):
            model += f" (equal weights in other networks, {trained.network} and {used.network})"
        refused.append(model)
    if None not in (trained.image_size, used.image_size) and trained.image_size != used.image_size:
        refused.append(f"image size {_size(trained)} in training, {_size(used)} here")
    ours, theirs = trained.image_spec or {}, used.image_spec or {}
    for key in sorted(ours.keys() & theirs.keys() - {"image_size"}):
        # With another image size, images are also resized to another size.
        if key == "resize" and trained.image_size != used.image_size:
            continue
        if ours[key] != theirs[key]:
            refused.append(f"{key} {_short(ours[key])} in training, {_short(theirs[key])} here")
    warned = []
    for key, words in (("layer", "layer {}"), ("tokens", "{} tokens")):
        before, now = getattr(trained, key), getattr(used, key)
        if None not in (before, now) and before != now:
            warned.append(f"trained on {words.format(before)}; it is used on {words.format(now)}")
    return Differences(refused, warned)


def check(
    trained: ActivationSource, used: ActivationSource, *, sae: str, shards: str, allow: bool
) -> tuple[str, ...]:
    """Refuse to use an SAE on activations of another model. All stages call this.

    Args:
        trained: activations that it was trained on.
        used: activations that it will be used on.
        sae: name of the SAE in messages.
        shards: URL of the activations.
        allow: only warn.

    Returns:
        The differences that were allowed. The caller must store them in its result.

    Raises:
        ConfigError: weights, preprocessing or image size differ, and ``allow`` is off.
    """
    refused, warned = compare(trained, used)
    for difference in warned:
        say_once(logger, f"{sae} was {difference}.")
    if refused and not allow:
        raise ConfigError(
            f"{sae} was trained on other activations than those in {shards}: "
            f"{'; '.join(refused)}. Metrics on them say nothing about the SAE. Use shards of the "
            "model and preprocessing that it was trained on, or give --allow-other-model, which is "
            "then recorded in the result."
        )
    if refused:
        say_once(
            logger,
            f"{sae} is used on activations of another model, in {shards}, as --allow-other-model "
            f"says: {'; '.join(refused)}.",
        )
    return tuple(refused)


def _same_model(a: ActivationSource, b: ActivationSource) -> bool:
    """Whether two models are the same, or may be, by the best key that is known of both."""
    networks, weights = (a.network, b.network), (a.weights, b.weights)
    if None not in networks and a.network != b.network:
        # Networks with equal tensors may differ in activation functions or numbers of heads, which
        # only names show. But one network may have different names in a folder, on a hub and in a
        # file, so structures are compared, too.
        return _is_equal(*weights) and _is_equal(a.structure, b.structure)
    if None not in networks and _is_random(a):
        return True
    for values in (weights, (a.ckpt_checksum, b.ckpt_checksum)):
        if None not in values:
            return values[0] == values[1]
    if None in (a.family, b.family, a.ckpt, b.ckpt):
        return True
    return (a.family, a.ckpt) == (b.family, b.ckpt)


def _is_equal(a: str | None, b: str | None) -> bool:
    """Whether two checksums are known and equal."""
    return None not in (a, b) and a == b


def _is_random(source: ActivationSource) -> bool:
    """Whether weights are untrained. Their last bits depend on the kind of processor."""
    return (source.network or source.ckpt or "").endswith("/random")


def _same_name_of_other_size(a: ActivationSource, b: ActivationSource) -> bool:
    """Whether weights may differ only in position embeddings for another image size."""
    is_other = None not in (a.image_size, b.image_size) and a.image_size != b.image_size
    keys = ("family", "ckpt", "ckpt_checksum", "network")
    return is_other and all(getattr(a, key) == getattr(b, key) for key in keys)


def _identified(source: ActivationSource) -> str:
    """The model with its checksum, which distinguishes it from others with the same name."""
    checksum = source.weights or source.ckpt_checksum
    if _is_random(source):
        checksum = None  # it depends on the kind of processor
    return f"{source.model} (weights {checksum[:23]}…)" if checksum else source.model


def _size(source: ActivationSource) -> str:
    return " x ".join(map(str, source.image_size or ()))


def _short(value: tp.Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)
