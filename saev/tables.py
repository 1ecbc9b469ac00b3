"""What a root holds, as Arrow tables: its SAEs, the latents of one, the curves of training.

`.to_pandas()` makes a table a data frame of pandas; polars and DuckDB read it as it is. The
notebooks that come with saev are made of these functions. Nothing here needs torch.
"""

import json
import typing as tp

import pyarrow as pa

from saev import storage
from saev.config import TrainConfig
from saev.config.train import RUN, open_run
from saev.errors import CorruptDataError
from saev.inference import files
from saev.inference.results import Results
from saev.visuals import overview
from saev.visuals.rows import Figures, Row

_CURVES = "metrics.jsonl"
_REMEDY = "Restore the run folder from a copy, or train it again."

_SAES = pa.schema(
    {
        "name": pa.string(), "run": pa.string(), "shards": pa.string(), "inference": pa.string(),
        "tag": pa.string(), "activation": pa.string(), "objective": pa.string(),
        "top_k": pa.int64(), "target_l0": pa.float64(), "d_model": pa.int64(), "d_sae": pa.int64(),
        "layer": pa.int64(), "lr": pa.float64(), "seed": pa.int64(), "n_train": pa.int64(),
        "side": pa.string(), "nmse": pa.float64(), "l0": pa.float64(), "n_dead": pa.int64(),
        "on_front": pa.bool_(),
        "training_nmse": pa.float64(), "training_l0": pa.float64(), "training_n_dead": pa.int64(),
        "all_nmse": pa.float64(), "all_l0": pa.float64(), "all_n_dead": pa.int64(),
        "dense_share": pa.float64(), "dense_above": pa.float64(),
    }
)  # fmt: skip


def saes(root: str, runs: tp.Sequence[str] | None = None) -> pa.Table:
    """All complete SAEs of a root, as its page shows them: one row per SAE and shards folder.

    The columns ``nmse``, ``l0`` and ``n_dead`` are the headline (docs/metrics.md); ``side`` says
    which images they are of: "held-out", "elsewhere" (another folder than that of training) or
    "all". Columns ``training_…`` are of images of training, ``all_…`` of all images that `saev
    inference` measured, as are ``dense_share`` and ``dense_above``. ``on_front`` is true if no
    other SAE on these shards has both a lower L0 and a lower error. ``run``, ``shards`` and
    ``inference`` are URLs; shards that were deleted keep theirs. What is not known is null.

    Args:
        root: URL of the folder that holds `runs` and `shards`.
        runs: URLs of run folders, to look at these only.

    Raises:
        CorruptDataError: a run or its results are damaged.
    """
    root = storage.normalize(root)
    sections = overview.collect(root, runs)
    rows = [_sae(root, section, row) for section in sections for row in section.rows]
    return pa.Table.from_pylist(rows, schema=_SAES)


def _sae(root: str, section: overview.Section, row: Row) -> dict[str, tp.Any]:
    config = row.config
    headline = section.headline(row)
    return {
        "name": row.name,
        "run": row.run,
        "shards": _shards_url(root, section.shards, config),
        "inference": row.results or None,
        "tag": config.tag,
        "activation": config.sae.activation.kind,
        "objective": config.objective.kind,
        "top_k": getattr(config.sae.activation, "top_k", None),
        "target_l0": config.objective.target_l0,
        "d_model": config.sae.d_model,
        "d_sae": config.sae.d_sae,
        "layer": config.train_data.layer,
        "lr": config.lr,
        "seed": config.seed,
        "n_train": config.n_train,
        "side": section.side,
        **_figures("", headline),
        "on_front": row.on_front and headline.nmse is not None,
        **_figures("training_", row.training),
        **_figures("all_", Figures.of(row.metrics)),
        "dense_share": row.metrics.get("dense_share"),
        "dense_above": row.metrics.get("dense_above"),
    }


def _figures(prefix: str, figures: Figures) -> dict[str, float | int | None]:
    return {f"{prefix}{key}": value for key, value in figures._asdict().items()}


def _shards_url(root: str, name: str, config: TrainConfig) -> str:
    """Where a shards folder is: in the root, or where training found it, or else where it was."""
    in_root = storage.join(root, "shards", storage.name(name))
    of_training = config.train_data.shards
    is_moved = storage.name(of_training) == name and not storage.is_dir(in_root)
    return of_training if is_moved and storage.is_dir(of_training) else in_root


def latents(inference: str) -> pa.Table:
    """All latents of one SAE, one row each, as `saev inference` measured them.

    The columns are ``latent`` (its number), ``frequency`` (share of tokens on which it fires),
    ``count`` (tokens on which it fires), ``mean_value`` (over these tokens; 0 if there are none)
    and ``max_value``. Behind them stand the other columns of latents.parquet (docs/formats.md), if
    the results have tables.

    Args:
        inference: URL of the results, RUN/inference/HASH.

    Raises:
        StorageError: they do not exist.
        IncompleteError: inference has not finished.
        CorruptDataError: they are damaged.
    """
    results = Results.open(inference)
    number = pa.array(range(results.d_sae), pa.int64())
    columns: dict[str, tp.Any] = {
        "latent": number,
        "frequency": results.frequency,
        "count": results.counts,
        "mean_value": results.mean_values,
        "max_value": results.max_values,
    }
    if results.has_tables:
        more = results.latents()
        if more["latent"].cast(pa.int64()).combine_chunks() != number:
            raise CorruptDataError(
                f"{results.url}: latents.parquet has not one row for each latent. {files.REMEDY}"
            )
        columns |= {key: more[key] for key in more.column_names if key not in columns}
    return pa.table(columns)


def curves(run: str) -> pa.Table:
    """The curves of training of one run, one row per logged step (docs/training.md).

    The columns are ``step`` and each figure under its own key, such as ``train/normalized_mse``. A
    value that was not finite is null. A run that is still training has its rows so far.

    Args:
        run: URL of the run folder.

    Raises:
        StorageError: there are no curves.
        CorruptDataError: they are damaged.
    """
    run = storage.normalize(run)
    place = storage.join(run, _CURVES)
    if storage.exists(storage.join(run, RUN)):
        data = open_run(run).read_bytes(_CURVES)
    else:
        data = storage.read_bytes(place)
    with storage.parsed(place, "a file of curves", remedy=_REMEDY):
        rows = [json.loads(line) for line in data.splitlines()]
        keys = dict.fromkeys(key for row in rows for key in row if key != "step")
        return pa.table(
            {
                "step": pa.array([row["step"] for row in rows], pa.int64()),
                **{key: pa.array([row.get(key) for row in rows], pa.float64()) for key in keys},
            }
        )
