"""The columns of examples.parquet, in a module of their own: it needs pyarrow, which code that only
looks at storage must do without.
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
"""Columns of examples.parquet. `index` counts the dataset's images, skipped ones too; `height` and
`width` are those of the original image in pixels, upright; `digest` is the CRC-32C of what the
dataset's digest is over (name, sizes, label). Version 0.1.0 did not write `digest`."""
