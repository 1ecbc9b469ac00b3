"""Listed files in little memory, beside a plain sorted list of them."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from saev.images.listed import File, Files, in_order

part = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=3
)
paths = st.lists(part, min_size=1, max_size=4).map("/".join)


def file(key: str, base: str = "s3://b/", matched: int = 0, size: int = 1) -> File:
    """A file whose label begins after so many folders of its key."""
    folders = key.split("/")[:-1]
    return File(base + key, key, "/".join(folders[min(matched, len(folders)) :]), size)


@st.composite
def files(draw: st.DrawFn) -> File:
    return file(
        draw(paths), draw(st.sampled_from(["s3://b/", "/a/", "s3://b//"])),
        draw(st.integers(0, 2)), draw(st.integers(0, 2**40)),
    )  # fmt: skip


@given(st.lists(files(), max_size=12))
def test_a_file_comes_back_as_it_was(given: list[File]) -> None:
    found = Files(given)
    assert list(found) == given
    assert found[:] == given
    assert found[1:-1:2] == given[1:-1:2]
    assert not given or found[-1] == given[-1]
    assert found.n_empty == sum(not f.size for f in given)


@given(st.lists(files(), max_size=12))
def test_order_is_that_of_components_and_the_first_of_equals_counts(given: list[File]) -> None:
    once: dict[str, File] = {}
    for one in given:
        once.setdefault(one.key, one)
    assert list(in_order(given)) == sorted(once.values(), key=lambda f: f.key.split("/"))


def test_many_files_take_little() -> None:
    tracemalloc.start()
    found = in_order(file(f"n{i // 100:04d}/n_{i:08d}.JPEG") for i in range(20_000))
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 20_000
    assert now / len(found) < 70
    assert peak / len(found) < 150
