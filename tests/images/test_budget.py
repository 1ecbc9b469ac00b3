"""Decoding in parallel holds a bounded number of pixels, whatever the number of threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forker import Forker
from pictures import encode
from PIL import Image

from saev.images import budget
from saev.images.budget import PixelBudget


def test_threads_together_stay_below_the_total():
    pixels = PixelBudget(100)
    lock = threading.Lock()
    held, most, alone = 0, 0, 0

    def work(n: int) -> None:
        nonlocal held, most, alone
        with pixels.example(lambda width, height: width * height):
            budget.admit(n, 1)
            budget.admit(n, 1)  # its mask: must not wait for itself
            with lock:
                held += n
                most = max(most, held if held != n else 0)
                alone += n > 100 and held == n
            time.sleep(0.001)
            with lock:
                held -= n

    sizes = [30, 60, 100, 500, 7, 45] * 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, sizes))
    assert most <= 100
    assert alone == sizes.count(500)  # larger than all of it: such an image goes alone
    assert pixels._in_use == 0


def test_room_is_given_back_after_an_error():
    pixels = PixelBudget(10)

    def fail() -> None:
        with pixels.example(lambda w, h: w * h):
            budget.admit(5, 2)
            raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            fail()
    with pixels.example(lambda w, h: w * h):
        budget.admit(5, 2)


def test_without_a_budget_nothing_waits():
    budget.admit(1 << 40, 1 << 40)


PEAK = """
import resource, sys
from saev.config import ImgFolder
from saev.images import ImageSpec, iter_examples, open_dataset
dataset = open_dataset(ImgFolder(root=sys.argv[1], max_pixels=16_000_000))
spec = ImageSpec(image_size=(8, 8), resize=8)
from saev.images import budget
budget.PIXELS_PER_WORKER = 4 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = len(list(iter_examples(dataset, range(len(dataset)), spec, n_workers=int(sys.argv[2]))))
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_memory_of_large_images_is_that_of_few(tmp_path: Path, forker: Forker):
    """Four images of 10 megapixels, which take 40 MB each: not four at once in four threads."""
    data = encode(Image.new("L", (4_000, 2_500)))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(data)
    n, megabytes = map(int, forker.output(PEAK, tmp_path, 4).split())
    assert n == 4
    # 4 million pixels for each of 4 threads: one such image at a time, 10 MB grey and 40 in RGB.
    assert megabytes < 150  # all four at once take 300
