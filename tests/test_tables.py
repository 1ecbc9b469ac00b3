"""Tables of a root, an SAE and its curves hold what is stored; commands draw what they say."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import small_root

import saev
from saev import cli, inference, tables
from saev.config import ImgFolder, VisualsConfig
from saev.errors import CorruptDataError, IncompleteError, StorageError

FIRST = ["latent", "frequency", "count", "mean_value", "max_value"]
FIRST_DTYPES = ["int64", "float64", "int64", "float64", "float32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAEs, of which one is measured."""
    return small_root.make(tmp_path_factory.mktemp("root"), (4,), not_measured=(8,))


def stored(root: Path, pattern: str) -> list[tuple[Path, dict]]:
    """Objects of all runs, as they stand on the disk."""
    return [(path, json.loads(path.read_text())) for path in sorted((root / "runs").glob(pattern))]


def test_saes_are_those_of_the_root(root: Path) -> None:
    found = saev.tables.saes(str(root)).to_pandas().set_index("run")
    runs = stored(root, "*/run.json")
    assert sorted(found.index) == [str(path.parent) for path, _ in runs]
    for path, record in runs:
        row = found.loc[str(path.parent)]
        assert row.side == "held-out"
        assert (row.nmse, row.l0) == (record["metrics"]["normalized_mse"], record["metrics"]["l0"])
        assert row.training_l0 == record["train_metrics"]["l0"]
        assert (row.d_sae, row.d_model, row.activation) == (128, 64, "top-k")
        assert row["name"] == f"topk{row.top_k}-s128"
        assert Path(row.shards, "shards.json").exists()
    ((path, metrics),) = stored(root, "*/inference/*/metrics.json")
    measured = found[found.inference.notna()]
    assert list(measured.inference) == [str(path.parent)]
    assert measured.all_nmse.item() == metrics["normalized_mse"]
    assert measured.dense_share.item() == metrics["dense_share"]
    # On the front is whatever no other SAE beats in both figures.
    beaten = [any((found.l0 < a.l0) & (found.nmse < a.nmse)) for a in found.itertuples()]
    assert list(found.on_front) == [not b for b in beaten]


def test_a_root_without_runs_has_no_rows(tmp_path: Path) -> None:
    assert tables.saes(str(tmp_path)).num_rows == 0


def test_latents_are_counted_in_the_codes(root: Path) -> None:
    ((path, metrics),) = stored(root, "*/inference/*/metrics.json")
    found = tables.latents(str(path.parent)).to_pandas()
    codes = inference.results.Results.open(str(path.parent)).codes().tocsc()
    assert found.latent.tolist() == list(range(128))
    np.testing.assert_array_equal(found["count"], np.diff(codes.indptr))
    np.testing.assert_allclose(found.frequency, found["count"] / metrics["n_tokens"])
    sums = np.asarray(codes.sum(0)).ravel()
    np.testing.assert_allclose(found.mean_value * found["count"], sums, rtol=1e-5)
    np.testing.assert_array_equal(found.max_value, codes.max(axis=0).toarray().ravel())
    assert [str(kind) for kind in found.dtypes[:5]] == FIRST_DTYPES
    with pytest.raises(IncompleteError, match="saev inference"):
        tables.latents(str(path.parents[2]))
    with pytest.raises(StorageError, match="does not exist"):
        tables.latents(str(path.parent / "elsewhere"))


def test_latents_have_the_columns_of_their_table(root: Path) -> None:
    ((path, _),) = stored(root, "*/inference/*/metrics.json")
    found = tables.latents(str(path.parent))
    table = pq.read_table(path.with_name("latents.parquet"))
    assert found.column_names[:5] == FIRST
    assert found.column_names[5:] == [n for n in table.column_names if n not in FIRST]
    for name in {*table.column_names} - {"latent"}:
        assert found[name].equals(table[name]), name


def test_latents_of_an_earlier_version_have_the_first_columns() -> None:
    old = Path(__file__).parent / "upgrade" / "root" / "saev"
    results = stored(old, "*/inference/*/metrics.json")
    assert results
    for path, metrics in results:
        found = tables.latents(str(path.parent)).to_pandas()
        assert list(found.columns) == FIRST
        assert [str(kind) for kind in found.dtypes] == FIRST_DTYPES
        assert found.latent.tolist() == list(range(metrics["d_sae"]))
        assert found["count"].sum() > 0


def test_curves_are_the_logged_rows(root: Path) -> None:
    for path in (root / "runs").glob("*/metrics.jsonl"):
        found = tables.curves(str(path.parent)).to_pandas()
        logged = pd.read_json(path, lines=True)
        assert len(found) == len(logged) > 1
        pd.testing.assert_frame_equal(found, logged[found.columns], check_dtype=False)


def test_curves_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Its folder has no closing object yet; rows may have other keys and values that are null."""
    rows = [{"step": 0, "train/mse": None}, {"step": 5, "train/mse": 2.5, "train/l0": 3}]
    place = tmp_path / "metrics.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tables.curves(str(tmp_path)).to_pydict()
    assert found == {"step": [0, 5], "train/mse": [None, 2.5], "train/l0": [None, 3.0]}
    for damaged in ('{"step": 0}\n{"st', '{"train/mse": 1}\n', '{"step": 0, "x": "text"}\n', "3\n"):
        place.write_text(damaged)
        with pytest.raises(CorruptDataError, match=r"metrics\.jsonl is not a file of curves"):
            tables.curves(str(tmp_path))


def test_curves_that_were_changed_are_refused(root: Path, tmp_path: Path) -> None:
    run = next((root / "runs").glob("*/run.json")).parent
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    text = (run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('"step": ', '"step": 1', 1))
    with pytest.raises(CorruptDataError, match=r"metrics\.jsonl"):
        tables.curves(str(tmp_path))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"latents": (3, 17), "n_latents": 0},
        {"log_freq_range": (-5.25, -1e-05), "log_value_range": (-0.5, math.log10(3)), "seed": 7},
        {"inference": "results", "out": "-", "allow_other_model": True, "image_size": 64},
        {"data": ImgFolder(root="it's/there", heic=True), "n_top": 3},
    ],
)
def test_a_command_is_its_config(keys: dict) -> None:
    cfg = VisualsConfig(run="a run", shards="s3://bucket/shards/0", **keys)
    program, *argv = shlex.split(saev.visuals.command(cfg))
    assert program == "saev"
    assert cli.parse(argv).configs() == [cfg]
