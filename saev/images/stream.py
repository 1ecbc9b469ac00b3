"""Decoding ahead: threads read, decode and transform examples, which are delivered in order.

Processes are not needed, because PIL and numpy release the interpreter's lock while they decode,
resize and normalise. Order and values are the same for any number of threads. The number of pixels
that all threads hold is bounded (:mod:`saev.images.budget`).
"""

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Generator, Iterable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from saev import cores
from saev.errors import ConfigError, ImageError
from saev.images.budget import Cost, PixelBudget
from saev.images.datasets import ImageDataset
from saev.images.transforms import ImageSpec, token_labels


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An example, ready for a model."""

    index: int
    """Index in the dataset."""
    pixels: Float[Tensor, "3 height width"]
    """The model's input, float32."""
    labels: UInt8[np.ndarray, " n_tokens"] | None
    """Labels of the content tokens, row by row; None without masks."""
    height: int
    """Height of the original upright image in pixels."""
    width: int
    """Width of the original upright image in pixels."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """An example that could not be decoded and was left out."""

    index: int
    """Index in the dataset."""
    url: str
    """URL of the image."""
    reason: str
    """A sentence that names the damaged file (the image or its mask)."""


def iter_examples(
    dataset: ImageDataset,
    indices: Iterable[int],
    spec: ImageSpec,
    *,
    grid: tuple[int, int] | None = None,
    n_workers: int = 0,
    look_ahead: int = 0,
    skip_unreadable: bool = False,
) -> Generator[Decoded | Unreadable, None, None]:
    """Decode examples in parallel, in the order of ``indices``.

    Threads start with the first ``next``. They have ended when the generator ends, is closed, or
    raises. Use ``contextlib.closing`` if a loop over it may be left early.

    Args:
        dataset: the images.
        indices: the examples, in the wanted order; may be lazy.
        spec: preprocessing of images.
        grid: rows and columns of content tokens, to turn masks into token labels; None does not
            read masks.
        n_workers: threads; 0 means one per core.
        look_ahead: most examples that are decoded or being decoded ahead of the consumer; 0 means
            four per thread.
        skip_unreadable: deliver an :class:`Unreadable` for an example that cannot be decoded. An
            example that cannot be read from storage is still an error, so that an outage does not
            empty a dataset.

    Yields:
        One record for every index.

    Raises:
        ImageError: an image or mask cannot be decoded, or their sizes differ. It is raised after
            all examples before it were delivered.
        StorageError: a file cannot be read.
        ConfigError: the masks cannot be cut into the grid, or a number is negative.
    """
    if min(n_workers, look_ahead) < 0:
        raise ConfigError(
            f"n_workers ({n_workers}) and look_ahead ({look_ahead}) cannot be negative."
        )
    return _iterate(
        dataset,
        indices,
        spec,
        grid if dataset.has_masks else None,
        n_workers or cores.available(),
        look_ahead,
        skip_unreadable,
    )


def _iterate(
    dataset: ImageDataset,
    indices: Iterable[int],
    spec: ImageSpec,
    grid: tuple[int, int] | None,
    n_workers: int,
    look_ahead: int,
    skip_unreadable: bool,
) -> Generator[Decoded | Unreadable, None, None]:
    closing = threading.Event()
    pixels = PixelBudget.of_threads(n_workers, dataset.max_pixels)
    cost = cost_of(spec, has_mask=grid is not None)

    def work(index: int) -> Decoded | Unreadable | None:
        if closing.is_set():
            return None
        try:
            with pixels.example(cost):
                return load_example(dataset, index, spec, grid)
        except ImageError as err:
            if not skip_unreadable:
                raise
            return Unreadable(index, dataset.example(index).url, str(err))

    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(n_workers, thread_name_prefix="saev-decode")
    try:
        for index in indices:
            pending.append(pool.submit(work, index))
            if len(pending) >= (look_ahead or 4 * n_workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        closing.set()
        pool.shutdown(wait=True, cancel_futures=True)


def load_example(
    dataset: ImageDataset, index: int, spec: ImageSpec, grid: tuple[int, int] | None = None
) -> Decoded:
    """Load one example, as :func:`iter_examples` does."""
    labels = None
    if grid is None:
        image = dataset.load(index)
    else:
        image, mask = dataset.load_pair(index)
        if mask is not None:
            cropped = spec.crop_mask(mask, fill=dataset.bg_label)
            labels = token_labels(cropped, grid, dataset.pixel_agg, dataset.bg_label)
    try:
        pixels = spec.apply(image)
    except ImageError as err:
        raise ImageError(f"Cannot use {dataset.example(index).url}: {err}") from err
    return Decoded(index, pixels, labels, image.height, image.width)


def cost_of(spec: ImageSpec, *, has_mask: bool) -> Cost:
    """The pixels of an example: image, mask of the same size, and resized image."""

    def cost(width: int, height: int) -> int:
        resized_height, resized_width = spec.resized(height, width)
        return width * height * (2 if has_mask else 1) + resized_height * resized_width

    return cost
