"""Decoding ahead: examples read, decoded and transformed by threads, delivered in order.

Threads are enough, because PIL and numpy release the interpreter's lock while they decode,
resize and normalise. The order and every value are the same for any number of threads. All
threads together hold a bounded number of pixels (:mod:`saev.images.budget`).
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
    """An example as a model takes it."""

    index: int
    """Index in the dataset."""
    pixels: Float[Tensor, "3 height width"]
    """The model's input, float32."""
    labels: UInt8[np.ndarray, " n_tokens"] | None
    """Labels of the content tokens, row by row; None without masks."""
    height: int
    """Of the original image in pixels, upright."""
    width: int
    """Of the original image in pixels, upright."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """An example that could not be decoded and was left out."""

    index: int
    """Index in the dataset."""
    url: str
    """The image."""
    reason: str
    """One sentence that names the file at fault (the image or its mask)."""


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

    Nothing starts before the first example is asked for. When the generator ends, is closed or
    raises, its threads have ended too; wrap it in ``contextlib.closing`` where the loop over it
    may be left early.

    Args:
        dataset: the images.
        indices: which examples, in which order; may be lazy.
        spec: how an image becomes the model's input.
        grid: rows and columns of content tokens, to turn masks into token labels; None leaves
            masks unread.
        n_workers: threads; 0 means one per core.
        look_ahead: most examples that are decoded or being decoded before they are asked for; 0
            means four per thread.
        skip_unreadable: deliver an :class:`Unreadable` for what cannot be decoded. What cannot be
            read from storage is an error all the same, so that no outage empties a dataset.

    Yields:
        One record for every index.

    Raises:
        ImageError: an image or mask cannot be decoded, or their sizes differ; in order, after
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
    """One example, as :func:`iter_examples` delivers it."""
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
    """What an example needs: its image, its mask of the same size, and the resized image."""

    def cost(width: int, height: int) -> int:
        resized_height, resized_width = spec.resized(height, width)
        return width * height * (2 if has_mask else 1) + resized_height * resized_width

    return cost
