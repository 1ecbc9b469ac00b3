"""Pieces on storage, and the matrix that they make up."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from test_storage import can_mount, in_namespace

from saev import storage
from saev.errors import CorruptDataError
from saev.inference import npz
from saev.inference.codes import CodesWriter, Columns, StoredCodes, TokenRows


def random_matrix(rng: np.random.Generator, n_rows: int, n_latents: int, density: float):
    dense = rng.standard_normal((n_rows, n_latents)).astype(np.float32)
    dense[rng.random(dense.shape) >= density] = 0
    return scipy.sparse.csr_matrix(dense)


def as_columns(matrix: scipy.sparse.csr_matrix) -> Columns:
    return Columns.from_rows(np.diff(matrix.indptr), matrix.indices, matrix.data, matrix.shape[1])


def store(root: str, matrix: scipy.sparse.csr_matrix, files: list[list[int]]) -> StoredCodes:
    """Write the rows as files of pieces of the given sizes."""
    infos, first = [], 0
    for i, sizes in enumerate(files):
        name = f"{i}.codes"
        with storage.open_write(storage.join(root, name)) as handle:
            writer = CodesWriter(handle, name, matrix.shape[1])
            for n in sizes:
                rows = np.arange(first, first + n)
                tokens = TokenRows(rows // 3, (rows % 3).astype(np.int32), (rows % 5).astype("i2"))
                writer.append(as_columns(matrix[first : first + n]), tokens)
                first += n
        infos.append(writer.info())
    assert first == matrix.shape[0]
    return StoredCodes(root, infos)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    files=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_pieces_make_up_the_matrix(seed, files, density) -> None:
    rng = np.random.default_rng(seed)
    n_rows = sum(map(sum, files))
    matrix = random_matrix(rng, n_rows, 6, density)
    root = f"memory://codes-{seed}"
    codes = store(root, matrix, files)
    npz.write_codes(storage.join(root, "a.npz"), codes, {"latents": np.arange(6)})
    data = storage.read_bytes(storage.join(root, "a.npz"))
    found = scipy.sparse.load_npz(io.BytesIO(data))
    assert found.format == "csr"
    assert found.dtype == np.float32
    assert found.shape == matrix.shape
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(matrix, name))
    assert found.has_sorted_indices
    arrays = np.load(io.BytesIO(data))
    np.testing.assert_array_equal(arrays["example_idx"], np.arange(n_rows) // 3)
    np.testing.assert_array_equal(arrays["token_idx"], np.arange(n_rows) % 3)
    np.testing.assert_array_equal(arrays["latents"], np.arange(6))

    # One file or many, one piece or many: the same bytes, locally too.
    once = store(f"{root}-once", matrix, [[n_rows]])
    npz.write_codes(storage.join(root, "b.npz"), once, {"latents": np.arange(6)})
    assert storage.read_bytes(storage.join(root, "b.npz")) == data
    for place in (root, f"{root}-once"):
        storage.delete(place, recursive=True)


def test_equal_bytes_on_disk_and_in_object_storage(tmp_path) -> None:
    matrix = random_matrix(np.random.default_rng(0), 20, 7, 0.3)
    written = []
    for root in (str(tmp_path), "memory://equal-bytes"):
        npz.write_codes(storage.join(root, "a.npz"), store(root, matrix, [[12], [8]]))
        written.append(storage.read_bytes(storage.join(root, "a.npz")))
    assert written[0] == written[1]
    with zipfile.ZipFile(io.BytesIO(written[0])) as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_many_entries_get_a_wide_indptr(tmp_path, monkeypatch) -> None:
    assert npz.index_dtype(2**31 - 1) == np.int32
    assert npz.index_dtype(2**31) == np.int64
    monkeypatch.setattr(npz, "index_dtype", lambda nnz: np.dtype("<i8"))
    matrix = random_matrix(np.random.default_rng(0), 20, 7, 0.3)
    npz.write_codes(str(tmp_path / "a.npz"), store(str(tmp_path), matrix, [[20]]))
    assert np.load(tmp_path / "a.npz")["indptr"].dtype == np.int64
    assert (scipy.sparse.load_npz(tmp_path / "a.npz") != matrix).nnz == 0


def test_a_block_of_columns_is_read_alone(tmp_path) -> None:
    matrix = random_matrix(np.random.default_rng(1), 30, 9, 0.4)
    (block,) = [piece.columns(3, 6) for piece in store(str(tmp_path), matrix, [[30]])]
    dense = np.zeros((30, 3), np.float32)
    dense[block.rows, block.latents] = block.values
    np.testing.assert_array_equal(dense, matrix[:, 3:6].toarray())
    np.testing.assert_array_equal(
        as_columns(matrix).select(np.array([7, 2])).values,
        np.concatenate([matrix[:, 7].tocsc().data, matrix[:, 2].tocsc().data]),
    )


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_named(tmp_path, damage) -> None:
    codes = store(str(tmp_path), random_matrix(np.random.default_rng(1), 30, 9, 0.4), [[30]])
    codes.verify()
    path = tmp_path / "0.codes"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-1])

    def read() -> list[Columns]:
        codes.verify()
        return [piece.columns() for piece in codes]

    with pytest.raises(CorruptDataError, match=r"0\.codes is damaged.*expected"):
        read()


def test_npz_writer_refuses_a_wrong_shape(tmp_path) -> None:
    with (
        storage.open_write(str(tmp_path / "a.npz")) as handle,
        pytest.raises(ValueError, match="3 elements were written"),
        npz.NpzWriter(handle) as writer,
    ):
        writer.write("x", (4,), [np.zeros(3)])


FULL_DISK = """
import sys
import numpy as np
from saev import storage
from saev.errors import StorageError
from saev.inference.npz import NpzWriter
try:
    with storage.open_write(sys.argv[1] + "/x.npz") as handle:
        with NpzWriter(handle) as writer:
            writer.write("data", (4 << 18,), [np.zeros(1 << 18, "<f4")] * 4)
except StorageError as err:
    print(err)
"""


@can_mount
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    done = in_namespace(tmp_path, "size=1m", FULL_DISK)
    (line,) = done.stdout.splitlines()
    assert "x.npz: no space left on the device." in line
    assert done.stderr == ""
