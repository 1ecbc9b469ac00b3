"""What the site has beside docs/: README as its home, two more pages, the API reference.

mkdocs calls the functions that begin with ``on_`` (see mkdocs.yml).
"""

import ast
import html
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages of the top folder → their names in the site."""
PACKAGES = (
    "saev", "saev.nn", "saev.loaders", "saev.shards", "saev.train", "saev.inference",
    "saev.inference.results", "saev.inference.image", "saev.visuals", "saev.tables", "saev.vit",
    "saev.images", "saev.config", "saev.errors",
)  # fmt: skip
"""What people import. Each gets a page with its public names."""
NOTEBOOKS = ("metrics", "own_model")
"""Pages that docs/notebooks.py makes, if SAEV_DOCS_NOTEBOOKS=1; it takes a minute or two."""
FILES = ("cluster.example.toml", "k8s/examples/external-secret.yaml", "saev/notebooks/start.py")
"""Files that pages link to, copied into the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what docs/ does not have."""
    for source, name in TOP.items():
        files.append(File.generated(config, name, content=moved((ROOT / source).read_text())))
    for name in FILES:
        files.append(File.generated(config, Path(name).name, content=(ROOT / name).read_text()))
    for name in NOTEBOOKS:
        source = (ROOT / "saev" / "notebooks" / f"{name}.py").read_text()
        code = f"<!DOCTYPE html><title>{name}.py</title><pre>{html.escape(source)}</pre>"
        files.append(File.generated(config, f"notebooks/{name}.html", content=code))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=reference(package)))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the pages of the API reference in the navigation."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "API reference" in entry:
            entry["API reference"] = [{package: f"api/{package}.md"} for package in PACKAGES]
    return config


def on_post_build(config: MkDocsConfig) -> None:
    """Run the notebooks, if that is asked for. Without it, their pages show their code."""
    if os.environ.get("SAEV_DOCS_NOTEBOOKS") == "1":
        spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
        assert spec is not None
        assert spec.loader is not None
        notebooks = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(notebooks)
        notebooks.export(Path(config.site_dir))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the copies."""
    return re.sub(r"\]\(\.\./([^)#\s]+)", lambda m: f"]({_copy(m[1])}", markdown)


def _copy(path: str) -> str:
    """Where the site has a file of the checkout."""
    name = Path(path)
    if name.parts[:2] == ("saev", "notebooks") and name.stem in NOTEBOOKS:
        return f"notebooks/{name.stem}.html"
    return TOP.get(path, name.name)


def moved(text: str) -> str:
    """A page of the top folder with its links as they are inside docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for source, name in TOP.items():
        text = re.sub(rf"\]\({source}", f"]({name}", text)
    return re.sub(r"\]\((saev/notebooks/\w+\.py)", lambda m: f"]({_copy(m[1])}", text)


def public_names(package: str) -> list[str]:
    """The public names of a package, by its ``__all__``, or else all that it defines."""
    path = ROOT.joinpath(*package.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(source.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    defined = (n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef))
    return [node.name for node in defined if not node.name.startswith("_")]


def reference(package: str) -> str:
    """The page of a package: its docstring, and each public name."""
    names = "\n\n".join(f"::: {package}.{name}" for name in public_names(package))
    about = f"::: {package}\n    options:\n      members: false\n      show_root_heading: false"
    return f"# {package}\n\n{about}\n\n{names}\n"
