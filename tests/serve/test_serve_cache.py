"""What the server keeps in memory stays below its limit."""

import threading
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saev.serve.cache import ByteCache, size_of


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_it_never_keeps_more_than_it_may(asked: list[tuple[int, bool]]) -> None:
    """Key k has k · 400 bytes; the model is a list of what was used last."""
    cache, kept = ByteCache(5000), {}
    for key, dear in asked:
        made: list[int] = []
        value = cache.get(key, lambda k=key, m=made: (m.append(k), bytes(400 * k))[1], dear=dear)
        assert len(value) == 400 * key
        assert bool(made) == (key not in kept)
        is_dear = kept.pop(key, dear)
        kept[key] = is_dear
        while sum(400 * k + 200 for k in kept) > 5000:
            usual = [k for k, is_dear in kept.items() if not is_dear]
            del kept[usual[0] if usual else next(iter(kept))]
        assert cache.n_bytes == sum(400 * k + 200 for k in kept)
        assert cache.n_bytes <= cache.max_bytes


def test_many_who_wait_get_one_value() -> None:
    cache, made = ByteCache(1 << 20), []
    begun = threading.Event()

    def make() -> bytes:
        made.append(1)
        begun.set()
        time.sleep(0.05)
        return b"x"

    threads = [threading.Thread(target=cache.get, args=("key", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert cache._locks == {}


def test_an_error_is_not_kept() -> None:
    cache = ByteCache(1000)

    def fail() -> bytes:
        raise ValueError

    for make in (fail, lambda: b"x"):
        try:
            found = cache.get("key", make)
        except ValueError:
            continue
        assert found == b"x"


def test_sizes_are_those_of_the_bytes() -> None:
    assert size_of(np.zeros(10)) == 80
    assert size_of({"ab": b"cde"}) == 5
    assert size_of([b"ab", "c"]) == 3
