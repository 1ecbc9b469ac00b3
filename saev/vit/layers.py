"""Numbers of blocks, and checks of a model against what the user stated about it."""

import typing as tp
from collections.abc import Sequence

from saev.errors import ModelError


def resolve_layers(layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Block indices with negative ones counted from the end, in the order given.

    Args:
        layers: block indices, -n_layers to n_layers - 1.
        n_layers: blocks of the model.

    Raises:
        ModelError: there is none, one is out of range, or two name the same block.
    """
    if not layers:
        raise ModelError("No layer is given; expected at least one block index.")
    resolved: dict[int, int] = {}
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise ModelError(
                f"Layer {layer} does not exist: the model has {n_layers} blocks, "
                f"so layers are 0 to {n_layers - 1}, or -{n_layers} to -1 counted from the end."
            )
        index = layer % n_layers
        if index in resolved:
            raise ModelError(
                f"Layers {resolved[index]} and {layer} are the same block ({index} of {n_layers}); "
                "give each block once."
            )
        resolved[index] = layer
    return tuple(resolved)


class Sizes(tp.Protocol):
    """The sizes that :func:`check_expectations` compares; a `VisionModel` has them."""

    @property
    def name(self) -> str:
        """Family and checkpoint, for messages."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    def content_tokens_per_example(self) -> int:
        """Patches per image."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""


def check_expectations(
    model: Sizes, *, d_model: int | None = None, content_tokens_per_example: int | None = None
) -> None:
    """Compare sizes that the user gave with those of the model; None means "not given".

    Raises:
        ModelError: they differ. The message has both numbers.
    """
    if d_model is not None and d_model != model.d_model:
        raise ModelError(
            f"--d-model is {d_model}, but {model.name} has d_model {model.d_model}. "
            "Leave the flag out, or name another checkpoint."
        )
    tokens = content_tokens_per_example
    if tokens is not None and tokens != model.content_tokens_per_example:
        height, width = model.image_size
        raise ModelError(
            f"--content-tokens-per-example is {tokens}, but {model.name} has "
            f"{model.content_tokens_per_example} content tokens for images of {height} x {width} "
            "pixels. Leave the flag out, or set --image-size."
        )
