"""A sample of what `python tests/torture/bits.py` counts: flipped bits in every kind of file."""

import json
import random
import shutil
from pathlib import Path

import pytest
from torture import bits

OLD_SHARDS = Path(__file__).parent / "upgrade" / "root" / "saev/shards/2ea428cd2d2cfec5"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bits.Kind]:
    return bits.make(tmp_path_factory.mktemp("bits"))


def test_every_read_is_right_or_one_sentence(kinds: dict[str, bits.Kind]) -> None:
    counts, failures = bits.flip_all(kinds, 120, random.Random(0))
    assert not failures, "\n".join(failures)
    assert sum(count["refused"] for count in counts.values()) > 80
    names = " ".join(counts)
    for name in (
        "acts000000.bin",
        "labels.bin",
        "run.json",
        "metrics.json",
        "pictures.json",
        "pictures.parquet",
    ):
        assert name in names


def test_what_an_earlier_version_wrote_ends_in_no_traceback(
    kinds: dict[str, bits.Kind], tmp_path: Path
) -> None:
    """Without lists there may be another value, where there were no checksums, but no traceback."""
    chosen = {name: kinds[name] for name in ("inference", "checkpoint", "run")}
    saved = {file: file.read_bytes() for kind in chosen.values() for file in kind.files}
    try:
        for file in list(saved):
            if file.suffix == ".json" and isinstance(raw := json.loads(saved[file]), dict):
                keys = [key for key in raw if key not in ("files", "checksum")]
                file.write_text(json.dumps({key: raw[key] for key in keys}))
        old = {
            name: bits.Kind(tuple(f for f in kind.files if f.exists()), kind.read)
            for name, kind in chosen.items()
        }
        old["shards"] = bits.shards(shutil.copytree(OLD_SHARDS, tmp_path / OLD_SHARDS.name))
        _, failures = bits.flip_all(old, 200, random.Random(1))
    finally:
        for file, data in saved.items():
            Path(file).write_bytes(data)
    assert not [f for f in failures if "another value" not in f]
