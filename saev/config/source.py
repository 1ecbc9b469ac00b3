"""What activations are, as it travels with SAEs and results, and the comparison of two of them."""

import logging
import typing as tp

import pydantic

from saev.config.base import Config, Dtype, Tokens
from saev.errors import ConfigError
from saev.once import say_once

logger = logging.getLogger(__name__)


class ActivationSource(Config):
    """What a model made of images: which model, of which images, which of its activations.

    None is not known: earlier versions, and other programs, recorded less.
    """

    model_config = pydantic.ConfigDict(extra="ignore")  # of a later version
    hides_keys: tp.ClassVar = True

    family: str | None = None
    """Model family."""
    ckpt: str | None = None
    """Checkpoint, in the family's naming."""
    ckpt_checksum: str | None = None
    """Checksum of the weights file, if the checkpoint names one."""
    network: str | None = None
    """Which network the checkpoint is, wherever its weights lie."""
    weights: str | None = None
    """Checksum of the network's tensors."""
    structure: str | None = None
    """Checksum of what the network is beside its tensors."""
    image_size: tuple[int, int] | None = None
    """Model input height and width in pixels."""
    image_spec: dict[str, tp.Any] | None = None
    """How images were resized, cropped and normalised."""
    layer: int | None = None
    """Block number."""
    tokens: Tokens | None = None
    """Which tokens of every example."""
    dtype: Dtype | None = None
    """Stored precision."""
    amp: bool | None = None
    """Whether the forward pass ran in bfloat16 autocast."""
    versions: dict[str, str] = pydantic.Field(default_factory=dict)
    """Versions of the libraries that recorded. To look at; never compared."""
    shards: str | None = None
    """Hash of the shards folder's metadata."""

    @property
    def model(self) -> str:
        """The model in a few words, without the place of its weights."""
        arch, _, weights = (self.ckpt or "an unknown checkpoint").partition("@")
        name = f"{arch}@{weights.rstrip('/').rpartition('/')[2]}" if weights else arch
        return f"{self.family or 'unknown family'} {name}"

    @property
    def described(self) -> str:
        """All that a person may want to know of it, in one sentence."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        parts = [
            _identified(self),
            f"images of {_size(self)} pixels" if self.image_size else "",
            f"{self.dtype}{' from bfloat16 autocast' if self.amp else ''}" if self.dtype else "",
            f"recorded with {versions}" if versions else "",
        ]
        return f"{', '.join(filter(None, parts))}."

    def filled(self, other: "ActivationSource") -> "ActivationSource":
        """With what is unknown here and known of ``other``."""
        mine = {k: v for k, v in self if v is not None and v != {}}
        return other.model_copy(update=mine)


class Differences(tp.NamedTuple):
    """What two sources differ in, in words that name both sides."""

    refused: list[str]
    """Those that make measurements of one with the SAE of the other meaningless."""
    warned: list[str]
    """Those that a person may want, as ends of a sentence."""


def compare(trained: ActivationSource, used: ActivationSource) -> Differences:
    """What differs between the activations of training and others. Unknown is not different.

    Precision and versions of libraries move activations by less than an SAE notices: they are
    recorded and shown, and not compared.
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
        # Where the model's input has another size, images are resized to another one, too.
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
    """Refuse to use an SAE on what its training says nothing about. Every stage asks this.

    Args:
        trained: what it was trained on.
        used: what it is to be used on.
        sae: what messages call the SAE.
        shards: URL of the activations.
        allow: go on all the same.

    Returns:
        What differs and was allowed; whoever writes a result writes it there.

    Raises:
        ConfigError: weights, preprocessing or image size differ, and ``allow`` is off.
    """
    refused, warned = compare(trained, used)
    for difference in warned:
        say_once(logger, f"{sae} was {difference}.")
    if refused and not allow:
        raise ConfigError(
            f"{sae} was trained on other activations than those in {shards}: "
            f"{'; '.join(refused)}. Figures from there say nothing about it. Take shards of the "
            "model and preprocessing that it was trained on, or give --allow-other-model; the "
            "result then says so."
        )
    if refused:
        say_once(
            logger,
            f"{sae} is used on activations of another model, in {shards}, as --allow-other-model "
            f"says: {'; '.join(refused)}.",
        )
    return tuple(refused)


def _same_model(a: ActivationSource, b: ActivationSource) -> bool:
    """Whether two models are the same one, or may be, by the best that is known of both."""
    networks, weights = (a.network, b.network), (a.weights, b.weights)
    if None not in networks and a.network != b.network:
        # Names tell other activation functions or numbers of heads, which no tensor shows. But a
        # folder, a hub and a file may each have a name of their own for one network.
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
    """Whether weights are untrained: drawn from one seed, with other last bits elsewhere."""
    return (source.network or source.ckpt or "").endswith("/random")


def _same_name_of_other_size(a: ActivationSource, b: ActivationSource) -> bool:
    """Whether weights may differ only in the position embeddings, fitted to another image size."""
    is_other = None not in (a.image_size, b.image_size) and a.image_size != b.image_size
    keys = ("family", "ckpt", "ckpt_checksum", "network")
    return is_other and all(getattr(a, key) == getattr(b, key) for key in keys)


def _identified(source: ActivationSource) -> str:
    """The model with the checksum that tells it from others of its name."""
    checksum = source.weights or source.ckpt_checksum
    if _is_random(source):
        checksum = None  # it may be that of other untrained networks, and of this one it may differ
    return f"{source.model} (weights {checksum[:23]}…)" if checksum else source.model


def _size(source: ActivationSource) -> str:
    return " x ".join(map(str, source.image_size or ()))


def _short(value: tp.Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)
