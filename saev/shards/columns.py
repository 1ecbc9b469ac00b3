"""The columns of examples.parquet.

This is a separate module because it imports pyarrow, which the small image does not have.
"""

import pyarrow as pa

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("target", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("digest", pa.uint32()),
    ]
)
"""Columns of examples.parquet.

- `index` counts all images of the dataset, including skipped ones.
- `height` and `width` are those of the original upright image, in pixels.
- `digest` is the CRC-32C of the example's part of the dataset's digest (name, sizes, label).
  Version 0.1.0 did not write it.
"""
