"""The notebooks as pages of the site: run, exported, and served with marimo's own front-end.

`marimo export html` writes pages that load the front-end from a CDN. Here they get a copy of it,
from the installed package, so that the site loads nothing from elsewhere.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import marimo

SOURCE = Path(__file__).parents[1] / "saev" / "notebooks"
FRONT_END = Path(marimo.__file__).parent / "_static"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/@marimo-team/frontend@[^/]+/dist")
BAR = """\
<p style="position: fixed; bottom: 0; left: 0; z-index: 1000; margin: 0; padding: .6rem 1rem; \
background: #1f2937; color: #fff; font: 14px/1.4 system-ui, sans-serif">This is {name} after it \
ran. What you change here computes nothing: <code>saev notebook {name}</code> writes it for you \
to use. <a style="color: #93c5fd" \
href="../guide.html#compare-and-choose-the-notebook">To the guide</a></p>
"""
HIDE_CODE = ("metrics",)
"""Notebooks that are tools; the others are read for their code."""


def export(site: Path) -> None:
    """Run the notebooks on a root that one of them makes, and write their pages.

    Args:
        site: the folder of the site; the pages are in its folder `notebooks`.
    """
    out = site / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(FRONT_END, out / "marimo", dirs_exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("own_model", "metrics"):  # the first makes the root that the second shows
            page = _exported(name, "own-model", folder)
            (out / f"{name}.html").write_text(page)


def _exported(name: str, root: str, folder: str) -> str:
    """The page of a notebook that ran in a folder."""
    shutil.copy(SOURCE / f"{name}.py", folder)
    command = [sys.executable, "-m", "marimo", "export", "html", f"{name}.py"]
    command += ["--no-include-code"] * (name in HIDE_CODE) + ["--", "--root", root]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The notebook {name} cannot be exported:\n{done.stderr[-2000:]}")
    page = CDN.sub("./marimo", done.stdout)
    head, body, rest = re.split(r"(<body[^>]*>)", page, maxsplit=1)
    return head + body + BAR.format(name=name) + rest
