"""The mutants of tests/mutants are of the code as it is now. Running them takes half an hour."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("room", ["loaders", "nn", "storage"])
def test_each_mutant_changes_one_place(room: str) -> None:
    path = ROOT / "tests" / "mutants" / "__main__.py"
    spec = importlib.util.spec_from_file_location("saev_mutants", path)
    assert spec
    assert spec.loader
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    found = mutants.read(room)
    assert len(found) >= 30
    for mutant in found:
        mutants.place(ROOT / "saev" / room, mutant.old)
        assert mutant.old != mutant.new
