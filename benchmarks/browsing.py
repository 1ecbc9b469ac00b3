"""For benchmarks of the explorer: pictures, and what is asked of its pages in a browser."""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from visuals import chromium

__all__ = ["FIRST", "SCROLL", "chromium", "picture", "timed", "typed"]

SCROLL = """
new Promise(done => {
  const times = []; let most = 0, last = performance.now();
  const step = now => {
    times.push(now - last); last = now;
    most = Math.max(most, document.querySelectorAll('.rows .row').length);
    const before = scrollY;
    scrollBy(0, 2 * innerHeight);
    if (scrollY === before) return done([times.sort((a, b) => a - b), most]);
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""
_PAINTED = """
(() => {
  const rows = [...document.querySelectorAll('.rows .row')];
  const seen = rows.filter(r => r.getBoundingClientRect().top < innerHeight);
  return seen.length >= 5 && seen.every(r => r.querySelector('canvas[data-drawn]'));
})()"""
FIRST = f"""
new Promise(done => {{
  const look = () => ({_PAINTED}) ? requestAnimationFrame(() => done(performance.now()))
    : setTimeout(look, 5);
  look();
}})"""


def timed(action: str, condition: str) -> str:
    """JavaScript that gives the milliseconds from an action to the frame after a condition."""
    return (
        "new Promise(done => { const start = performance.now();"
        f"{action}; const look = () => ({condition}) ? requestAnimationFrame(() => "
        "done(performance.now() - start)) : setTimeout(look, 1); look(); })"
    )


def typed(text: str) -> str:
    """JavaScript that types into the search."""
    return (
        f"(() => {{ const e = document.getElementById('search'); e.value = '{text}';"
        "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def picture(rng: np.random.Generator, size: int) -> bytes:
    """About as large as that of a photograph."""
    low = rng.integers(0, 256, (size // 6, size // 6, 3), dtype=np.uint8)
    image = Image.fromarray(low).resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=70)
    data = buffer.getvalue()
    return data + bytes(-len(data) % 3)
