"""Programs that pods run, as text: the images have saev and nothing of its tests."""

from pathlib import Path


def code(name: str) -> str:
    """The text of a program."""
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
