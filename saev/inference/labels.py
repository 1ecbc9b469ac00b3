"""The classes of images that a shards folder records."""

import typing as tp

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev.inference.job import Pass


class ImageLabels(tp.NamedTuple):
    """Files and classes of all examples of a shards folder."""

    indices: np.ndarray
    """Number in the dataset, int64 [n_examples]."""
    paths: pa.Array
    """Files or keys."""
    labels: pa.Array
    """Names of the examples' classes."""
    class_of: np.ndarray
    """Class of each example, as an index of `targets`, int64 [n_examples]; -1 if it has none."""
    targets: np.ndarray
    """The classes' numbers in the dataset, int64 [classes]."""
    names: list[str | None]
    """The classes' names."""

    @classmethod
    def read(cls, job: Pass) -> "ImageLabels":
        """Read them. If all images have the same class, there are no classes."""
        table = job.shards.examples()
        n = job.shards.n_examples
        none = np.full(n, -1, dtype=np.int64)
        index = table["index"].to_numpy()
        if "label" not in table.column_names:
            nothing = pa.nulls(n, pa.string())
            return cls(index, nothing, nothing, none, np.empty(0, np.int64), [])
        path, label = table["url"].combine_chunks(), table["label"].combine_chunks()
        has_label = pc.not_equal(label, "").to_numpy(zero_copy_only=False)
        target = table["target"].to_numpy()
        targets, first = np.unique(target[has_label], return_index=True)
        if len(targets) < 2:
            return cls(index, path, label, none, np.empty(0, np.int64), [])
        class_of = np.where(has_label, np.searchsorted(targets, target), -1)
        names = label.take(pa.array(np.flatnonzero(has_label)[first])).to_pylist()
        return cls(index, path, label, class_of, targets, names)
