"""One interface to every vision transformer: images in, the residual stream after any block out."""

import dataclasses
import functools
import threading
import typing as tp
import weakref
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saev.errors import ModelError
from saev.images.transforms import ImageSpec
from saev.vit import checkpoints
from saev.vit.layers import resolve_layers


@dataclasses.dataclass(frozen=True)
class Tower:
    """The result of a family's loader: a network and the positions of its tokens.

    The class token, if there is one, is the first token. Register and distillation tokens follow.
    Then come the content tokens in row-major order. All ViTs of timm and open_clip have this order.
    """

    module: nn.Module
    """Called with images [batch, 3, height, width] of `spec.image_size`; runs every block."""
    blocks: Sequence[nn.Module]
    """The transformer blocks in the order in which they run. Each returns the residual stream, or
    a tuple that starts with it: [batch, tokens, d_model], [tokens, batch, d_model], or, without
    special tokens, [batch, rows, columns, d_model]."""
    grid: tuple[int, int]
    """Rows and columns of content tokens."""
    spec: ImageSpec
    """Preprocessing of images."""
    special_tokens: int = 1
    """Tokens before the first content token: class, register and distillation tokens."""
    cls_token: bool = True
    """Whether the first special token is a class token."""
    pool: Callable[[Tensor], Tensor] | None = None
    """The model's own image embedding: images -> [batch, d]. None uses the class token after the
    last block, or the mean of the content tokens."""
    ckpt_checksum: str | None = None
    """Checksum of the weights file, if the weights were read from one."""
    network: str | None = None
    """Name of the network, which does not depend on the location of its weights. Networks with
    equal names have equal structure. The name ends in ``/random`` if the weights are untrained.
    None means the checkpoint's name without the URL of its file."""
    network_before: str | None = None
    """The network that version 0.1.0 of saev built from this checkpoint, if it was another one."""


class _Done(Exception):
    """Ends a forward pass after the last block that is needed. It is caught in this module."""


class VisionModel:
    """A frozen vision transformer whose residual stream can be recorded.

    Args:
        tower: the network.
        family: the registered family, for messages and metadata.
        ckpt: the checkpoint as the user named it.
        device: where to run.

    Raises:
        ModelError: the network is not a plain ViT (its blocks do not all return the stated tokens,
            or do not run exactly once each, in order).
    """

    def __init__(self, tower: Tower, *, family: str, ckpt: str, device: str | torch.device = "cpu"):
        self.family = family
        self.ckpt = ckpt
        self.device = torch.device(device)
        self.spec = tower.spec
        self.image_size = tower.spec.image_size
        self.grid = tower.grid
        self.has_cls_token = tower.cls_token
        self.ckpt_checksum = tower.ckpt_checksum
        self.network = tower.network or checkpoints.without_url(ckpt, tower.ckpt_checksum)
        self.network_before = tower.network_before
        self._pool = tower.pool
        self._special_tokens = tower.special_tokens
        self._blocks = list(tower.blocks)
        self._recording = threading.local()
        self.module = tower.module.eval().requires_grad_(False).to(self.device)
        if not self._blocks:
            raise ModelError(f"{self.name} has no transformer blocks; nothing can be recorded.")
        if tower.cls_token and tower.special_tokens < 1:
            raise ModelError(f"{self.name} states a class token but no special tokens.")
        hooks = [b.register_forward_hook(self._hook_of(i)) for i, b in enumerate(self._blocks)]
        try:
            self._tokens_axis, self.d_model = self._dry_run()
        except BaseException:
            for hook in hooks:
                hook.remove()
            raise

    @property
    def name(self) -> str:
        """Family and checkpoint, for messages."""
        return f"{self.family} {self.ckpt}"

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 over the names, types, shapes and values of the network's tensors.

        It does not depend on where the weights came from (a hub, or a file of any format). Position
        embeddings are those after the interpolation to the image size.
        """
        return checkpoints.fingerprint(self.module.state_dict())

    @functools.cached_property
    def structure(self) -> str:
        """SHA-256 over the network without its tensors: see `checkpoints.structure`."""
        return checkpoints.structure(self.module)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def content_tokens_per_example(self) -> int:
        """Patches per image."""
        return self.grid[0] * self.grid[1]

    def record(
        self,
        images: Float[Tensor, "batch 3 height width"],
        layers: Sequence[int],
        cls_token: bool = True,
    ) -> Float[Tensor, "layers batch tokens d_model"]:
        """The residual stream after the given blocks, on the model's device.

        May be called from many threads at once. Call it inside ``torch.autocast`` for a forward
        pass in lower precision. The result has the dtype of the model's residual stream.

        Args:
            images: images preprocessed by ``spec.apply``, on any device.
            layers: block indices; negative ones count from the end.
            cls_token: put the class token first, if the model has one.

        Returns:
            Layers are in the given order. Tokens are the class token (if requested and there is
            one), then the content tokens in row-major order, without register and distillation
            tokens.

        Raises:
            ModelError: a layer does not exist, or the images have another size.
        """
        rows = {layer: row for row, layer in enumerate(resolve_layers(layers, self.n_layers))}
        self._check_images(images)
        first = 1 if cls_token and self.has_cls_token else 0
        out: Tensor | None = None

        def keep(layer: int, stream: Tensor) -> None:
            nonlocal out
            stream = self._batch_first(stream)
            if out is None:
                tokens = first + self.content_tokens_per_example
                shape = (len(rows), len(images), tokens, self.d_model)
                out = torch.empty(shape, dtype=stream.dtype, device=stream.device)
            out[rows[layer], :, :first] = stream[:, :first]
            out[rows[layer], :, first:] = stream[:, self._special_tokens :]

        self._run(images, frozenset(rows), keep)
        if out is None:
            raise ModelError(f"{self.name} ran none of the blocks {sorted(rows)}.")
        return out

    def pool(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch d"]:
        """The model's own image embedding, float32.

        CLIP and SigLIP: the embedding that is compared with text, before normalisation. timm: the
        input of the classifier (usually the class token after the final norm). Others: the class
        token after the last block, or the mean of the content tokens.

        Raises:
            ModelError: the images have another size.
        """
        self._check_images(images)
        if self._pool is not None:
            with torch.no_grad():
                pooled = self._pool(images.to(self.device, non_blocking=True))
        else:
            stream = self.record(images, [-1])[0]
            pooled = stream[:, 0] if self.has_cls_token else stream.mean(dim=1)
        return pooled.float()

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ModelError(
                f"{self.name} takes images of shape [batch, 3, {height}, {width}], "
                f"found {list(images.shape)}. Use model.spec.apply."
            )

    def _run(
        self, images: Tensor, layers: frozenset[int], keep: Callable[[int, Tensor], None]
    ) -> None:
        """Run a forward pass up to the last of the layers. Calls `keep` with each layer's
        output."""
        self._recording.request = (layers, keep)
        try:
            with torch.no_grad():
                self.module(images.to(self.device, non_blocking=True))
        except _Done:
            pass
        finally:
            del self._recording.request

    def _hook_of(self, layer: int) -> Callable[[nn.Module, tp.Any, tp.Any], None]:
        """The forward hook of a block.

        Hooks are never removed, because other threads may be running a forward pass. A hook does
        nothing unless its own thread is recording this layer. It refers to this object weakly:
        otherwise the weights would stay in memory until Python looks for cycles.
        """
        reference = weakref.ref(self)

        def hook(_module: nn.Module, _args: tp.Any, output: tp.Any) -> None:
            model = reference()
            request = getattr(model._recording, "request", None) if model else None
            if model is None or request is None or layer not in request[0]:
                return
            layers, keep = request
            keep(layer, model._stream(layer, output))
            if layer == max(layers):
                raise _Done

        return hook

    def _stream(self, layer: int, output: tp.Any) -> Tensor:
        """The residual stream in a block's output."""
        while isinstance(output, tuple | list) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            raise ModelError(
                f"Block {layer} of {self.name} returns {type(output).__name__}, expected a tensor."
            )
        return output.flatten(1, 2) if output.ndim == 4 else output

    def _batch_first(self, stream: Tensor) -> Tensor:
        return stream if self._tokens_axis == 1 else stream.transpose(0, 1)

    def _dry_run(self) -> tuple[int, int]:
        """Run all blocks once on zeros. Returns the axis of tokens, and d_model."""
        n_tokens = self._special_tokens + self.content_tokens_per_example
        n_images = 2 if n_tokens != 2 else 3  # differs from n_tokens, to tell the axes apart
        images = torch.zeros(n_images, 3, *self.image_size)
        ran: list[int] = []
        found: set[tuple[int, ...]] = set()

        def keep(layer: int, stream: Tensor) -> None:
            ran.append(layer)
            found.add(tuple(stream.shape))

        self._run(images, frozenset(range(self.n_layers)), keep)
        if ran != list(range(self.n_layers)):
            raise ModelError(
                f"{self.name} is not a plain ViT: its {self.n_layers} blocks ran in the order "
                f"{ran}, expected each of them once, in order."
            )
        shape = found.pop()
        if not found and len(shape) == 3:
            if shape[:2] == (n_images, n_tokens):
                return 1, shape[2]
            if shape[:2] == (n_tokens, n_images):
                return 0, shape[2]
        raise ModelError(
            f"{self.name} is not a plain ViT: for {n_images} images its blocks return "
            f"{sorted(map(list, found | {shape}))}, expected [{n_images}, {n_tokens}, d_model] "
            f"({self._special_tokens} special + {self.grid[0]} x {self.grid[1]} content tokens)."
        )
