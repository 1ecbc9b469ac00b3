"""The latents of any image: encoded as the images of a dataset were recorded and measured.

:class:`ImageReader` loads the model and one or several SAEs once, and then takes a file, bytes or a
PIL image. Preprocessing, layer, tokens and precision are those that were recorded, so the active
latents of an image of the dataset are those of `saev inference`. Values differ by rounding, because
a recording computes several images at a time.
"""

import dataclasses
import importlib.util
import os
import threading
import typing as tp
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from saev import storage, vit
from saev.config.base import Tokens
from saev.config.images import MAX_PIXELS
from saev.config.source import ActivationSource, compare
from saev.device import choose_device
from saev.errors import ConfigError, ImageError, ModelError
from saev.images.decode import Limits, decode_image, upright_rgb
from saev.inference.described import Describe
from saev.inference.results import Results
from saev.nn.codes import encode
from saev.nn.io.load import HUB_PREFIX, load_sae
from saev.nn.sae import SparseAutoencoder
from saev.vit.recorded import load_recorded

ImageLike = str | os.PathLike | bytes | Image.Image
"""A URL or path, the bytes of a file, or an open image."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
REMEDY = "Take another file, or save it again as JPEG or PNG."
"""For errors about files that are no usable images."""


def own_limits(max_pixels: int = MAX_PIXELS, flag: str = "") -> Limits:
    """Limits on images that are no dataset's. HEIC is read if pillow-heif is installed.

    Args:
        max_pixels: most pixels.
        flag: the flag that allows more, for messages.
    """
    return Limits(max_pixels, heic=importlib.util.find_spec("pillow_heif") is not None, flag=flag)


class Peaks(tp.NamedTuple):
    """Latents that fire on some patches, those with the largest values first."""

    latents: np.ndarray
    """int32 [n]."""
    values: np.ndarray
    """Largest value on the patches, float32 [n]."""
    means: np.ndarray
    """Mean value over all of the patches, zeros included, float32 [n]."""
    n_patches: np.ndarray
    """Patches on which the latent fires, int64 [n]."""


@dataclasses.dataclass(frozen=True)
class ImageCodes:
    """The active latents of one SAE on one image, by patch, then by latent."""

    run: str
    """URL of the SAE."""
    name: str
    """Name of the image."""
    d_sae: int
    """Number of latents of the SAE."""
    latents: np.ndarray
    """int32 [nnz]."""
    patches: np.ndarray
    """Content token from 0, row by row; -1 is the class token. int32 [nnz]."""
    values: np.ndarray
    """float32 [nnz]; never 0."""
    n_tokens: int
    """Tokens that were encoded."""
    shape: tuple[int, int]
    """Rows and columns of patches."""
    crop: Image.Image
    """The part of the image that the model sees, RGB, in the size of its input."""
    size: tuple[int, int]
    """Width and height of the whole image as it is displayed, in pixels."""
    source: ActivationSource
    """The model, preprocessing, layer, tokens and precision."""

    def map(self, latent: int) -> Float[np.ndarray, "rows columns"]:
        """A latent's values on the patches, float32.

        Raises:
            ConfigError: there is no such latent.
        """
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"There is no latent {latent}: the SAE has {self.d_sae}.")
        out = np.zeros(self.shape[0] * self.shape[1], dtype=np.float32)
        mine = (self.latents == latent) & (self.patches >= 0)
        out[self.patches[mine]] = self.values[mine]
        return out.reshape(self.shape)

    def peaks(self, patches: Sequence[int] | None = None) -> Peaks:
        """The latents that fire on the image.

        Args:
            patches: only on these; by default on all tokens, the class token included if it was
                encoded.
        """
        keep = slice(None) if patches is None else np.isin(self.patches, patches)
        latents, values = self.latents[keep], self.values[keep]
        n = self.n_tokens if patches is None else len(set(patches))
        found, first = np.unique(latents, return_inverse=True)
        largest = np.full(len(found), -np.inf, dtype=np.float32)
        np.maximum.at(largest, first, values)
        sums = np.bincount(first, weights=values, minlength=len(found))
        counts = np.bincount(first, minlength=len(found))
        order = np.argsort(-largest, kind="stable")
        means = (sums / max(n, 1)).astype(np.float32)
        return Peaks(found[order].astype(np.int32), largest[order], means[order], counts[order])


class _Model:
    """The model of some readers, which is loaded when the first of them needs it."""

    def __init__(self, source: ActivationSource, record: str, ckpt: str, device: torch.device):
        self.source, self._record, self._ckpt, self.device = source, record, ckpt, device
        self._lock = threading.Lock()
        self._loaded: vit.VisionModel | None = None

    def is_same(self, other: "_Model") -> bool:
        """Whether another one is of the same model on the same device."""
        same_place = (self._ckpt, self.device) == (other._ckpt, other.device)
        return same_place and not compare(self.source, other.source).refused

    def load(self, tell: Callable[[str], None]) -> vit.VisionModel:
        """The model."""
        with self._lock:
            if self._loaded is None:
                tell(f"load the model {self.source.model}")
                self._loaded = load_recorded(
                    self.source, self._record, ckpt=self._ckpt, device=self.device
                )
            return self._loaded


class _Member(tp.NamedTuple):
    """An SAE, and the activations that it encodes."""

    run: str
    sae: SparseAutoencoder
    source: ActivationSource
    record: str
    """URL of the file or folder that names the source."""


class ImageReader:
    """Encodes images with SAEs of one model. Use :meth:`open`. May be used by several threads."""

    def __init__(
        self,
        members: Sequence[_Member],
        model: _Model,
        limits: Limits,
        tell: Callable[[str], None],
    ):
        self._members, self._shared = tuple(members), model
        self._limits, self._tell = limits, tell

    @classmethod
    def open(
        cls,
        run: str | Sequence[str],
        *,
        shards: str = "",
        results: Results | None = None,
        ckpt: str = "",
        layer: int | None = None,
        tokens: Tokens | None = None,
        device: str = "cpu",
        allow_other_model: bool = False,
        like: "ImageReader | None" = None,
        limits: Limits | None = None,
        tell: Callable[[str], None] = lambda text: None,
        **options: tp.Any,
    ) -> "ImageReader":
        """Open SAEs. The model is loaded by :meth:`load`, or with the first image.

        Args:
            run: URLs of run folders, or of what :func:`saev.load_sae` reads. Several must be of one
                model; they share its forward pass.
            shards: URL of the shards folder whose recording is repeated. By default that of
                training, as the run describes it; the folder is then not needed.
            results: what `saev inference` measured of the SAE: repeat this, whatever the SAE was
                trained on.
            ckpt: where the model's weights are now, if they have moved (``vits14@URL``).
            layer: block number, if neither run nor shards decide it.
            tokens: by default those of training.
            device: cpu, cuda, cuda:N, or auto.
            allow_other_model: only warn if `shards` are of another model than the SAE's.
            like: another reader, whose model is used if it is the same one.
            limits: on image files. By default those of datasets; HEIC is read if pillow-heif is
                installed.
            tell: called with a few words whenever something begins that takes time.
            **options: of :func:`saev.load_sae`.

        Raises:
            ConfigError: the SAEs are of different models, or what they read is not recorded.
            CheckpointError, StorageError: an SAE or the shards are missing or damaged.
        """
        runs = [run] if isinstance(run, str) else list(run)
        if not runs:
            raise ConfigError("No SAE: name at least one run.")
        where = choose_device(device)
        describe = Describe(shards, results, layer, tokens, allow=allow_other_model)
        members = []
        for url in dict.fromkeys(
            one if one.startswith(HUB_PREFIX) else storage.normalize(one) for one in runs
        ):
            tell(f"load the SAE {storage.name(url)}")
            sae = load_sae(url, where, **options)
            members.append(_Member(url, sae, *describe(url, sae)))
        first = members[0]
        for other in members[1:]:
            if differences := compare(first.source, other.source).refused:
                raise ConfigError(
                    f"{first.run} and {other.run} are SAEs of different models, which cannot share "
                    f"a forward pass: {'; '.join(differences)}. Open them one by one."
                )
        model = _Model(first.source, first.record, ckpt, where)
        if like is not None and model.is_same(like._shared):
            model = like._shared
        return cls(members, model, limits or own_limits(), tell)

    @property
    def runs(self) -> tuple[str, ...]:
        """URLs of the SAEs."""
        return tuple(member.run for member in self._members)

    def shares_model(self, other: "ImageReader") -> bool:
        """Whether another reader has the same model in memory."""
        return self._shared is other._shared

    def load(self) -> None:
        """Load the model and compare it with what was recorded. Does nothing the second time.

        Raises:
            ConfigError: stored files name a place of the weights that only the user may name.
            ModelError: the weights are missing or are others, or the SAE does not fit.
        """
        _ = self._model

    @property
    def _model(self) -> vit.VisionModel:
        model = self._shared.load(self._tell)
        for one in self._members:
            if one.sae.d_model != model.d_model:
                raise ModelError(
                    f"The SAE at {one.run} reads activations of width {one.sae.d_model}, "
                    f"{model.name} has width {model.d_model}. Name the shards of its model with "
                    "--shards URL."
                )
        return model

    def read(self, image: ImageLike, name: str = "") -> ImageCodes:
        """Encode an image with the only SAE, see :meth:`read_each`.

        Raises:
            ConfigError: there are several SAEs.
        """
        if len(self._members) > 1:
            raise ConfigError(f"There are {len(self._members)} SAEs: use read_each.")
        return self.read_each(image, name)[0]

    def read_each(self, image: ImageLike, name: str = "") -> tuple[ImageCodes, ...]:
        """Encode an image with each SAE, in the order of :attr:`runs`.

        Args:
            image: URL or path, bytes of a file, or an open PIL image. Its EXIF orientation is
                applied.
            name: of the image in errors and results; by default its file name.

        Raises:
            ImageError: it is no image, is damaged, too large or too narrow.
            StorageError: it cannot be read.
            ConfigError, ModelError: as :meth:`load`.
        """
        name = name or _name(image)
        picture = self._decode(image, name)
        model = self._model
        spec = model.spec
        try:
            crop = spec.crop(picture)
            pixels = spec.apply(picture)
        except ImageError as err:
            raise ImageError(f"Cannot use {name}: {err}") from err
        self._tell("run the model")
        acts = self._activations(model, pixels)
        return tuple(
            _encode(model, member, acts[_pass(member)], name, crop, picture.size)
            for member in self._members
        )

    def _decode(self, image: ImageLike, name: str) -> Image.Image:
        if isinstance(image, Image.Image):
            return upright_rgb(image, name, self._limits, REMEDY)
        data = image if isinstance(image, bytes) else self._fetch(image)
        return decode_image(data, name, self._limits, REMEDY)

    def _fetch(self, url: str | os.PathLike) -> bytes:
        n_bytes = storage.size(url)
        if n_bytes > self._limits.max_bytes:
            raise ImageError(
                f"Cannot decode {url}: it has {n_bytes} bytes, at most {self._limits.max_bytes} "
                f"are read. {REMEDY}"
            )
        return storage.read_bytes(url)

    def _activations(self, model: vit.VisionModel, pixels: Tensor) -> dict["_Pass", Tensor]:
        """float32 [tokens, d_model] of each layer and precision; the class token comes first."""
        wanted = sorted({_pass(member) for member in self._members})
        found: dict[_Pass, Tensor] = {}
        for amp in sorted({one.amp for one in wanted}):
            mine = [one for one in wanted if one.amp == amp]
            layers = sorted({one.layer for one in mine})
            with (
                torch.inference_mode(),
                torch.autocast(model.device.type, torch.bfloat16, enabled=amp),
            ):
                stream = model.record(pixels[None], layers)
            for one in mine:
                found[one] = stream[layers.index(one.layer), 0].to(_DTYPES[one.dtype]).float()
        return found


class _Pass(tp.NamedTuple):
    """What distinguishes activations of one image in one model."""

    layer: int
    dtype: str
    amp: bool


def _pass(member: _Member) -> _Pass:
    source = member.source
    return _Pass(tp.cast(int, source.layer), source.dtype or "float32", bool(source.amp))


def _encode(
    model: vit.VisionModel,
    member: _Member,
    acts: Tensor,
    name: str,
    crop: Image.Image,
    size: tuple[int, int],
) -> ImageCodes:
    n_special = len(acts) - model.content_tokens_per_example
    first = 0 if member.source.tokens in ("all", "special") else n_special
    last = n_special if member.source.tokens == "special" else len(acts)
    x = acts[first:last]
    if not len(x):
        raise ConfigError(
            f"The SAE at {member.run} is of special tokens, and {model.name} has no "
            "class token. Choose others with tokens=…."
        )
    if not bool(x.isfinite().all()):
        raise ModelError(
            f"{model.name} gives NaN or infinity for {name} in {member.source.dtype}. "
            "Nothing can be computed from that."
        )
    with torch.inference_mode():
        codes = encode(member.sae, x)
    rows = np.repeat(np.arange(first, last, dtype=np.int32), codes.row_nnz.cpu().numpy())
    return ImageCodes(
        run=member.run,
        name=name,
        d_sae=member.sae.d_sae,
        latents=codes.latents.cpu().numpy(),
        patches=rows - np.int32(n_special),
        values=codes.values.float().cpu().numpy(),
        n_tokens=len(x),
        shape=model.grid,
        crop=crop,
        size=size,
        source=member.source,
    )


def _name(image: ImageLike) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    opened = getattr(image, "filename", "")
    return str(opened) if opened else "the image"
