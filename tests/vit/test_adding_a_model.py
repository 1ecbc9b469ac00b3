"""docs/adding-a-model.md: its example runs, and its tables say what the code says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from saev import vit
from saev.vit import dino

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.M | re.S)


@pytest.mark.slow
def test_the_example_runs_as_it_stands(tmp_path: Path):
    """The network and its family in a module, the trial in a script, as a reader would do it."""
    network, family, trial = blocks("python")
    (tmp_path / "my_vit.py").write_text(network + family)
    (entry,) = (tomllib.loads(block) for block in blocks("toml"))
    declared = entry["project"]["entry-points"]["saev.families"]
    info = tmp_path / "my_vit-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-vit\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[saev.families]\n" + "\n".join(f"{k} = {v}" for k, v in declared.items())
    )
    weights = tmp_path / "my.safetensors"
    (tmp_path / "trial.py").write_text(
        f"import torch\n{trial}\n"
        "import safetensors.torch\n"
        f"safetensors.torch.save_file(model.module.state_dict(), {str(weights)!r})\n"
        f"again = load('my-vit', 'base@{weights}')\n"
        "assert again.ckpt_checksum.startswith('crc32c:')\n"
        "assert torch.equal(again.record(images, [0, -1]), acts)\n"
        "assert again.record(images, [0], cls_token=False).shape == (1, 2, 16, 32)\n"
        "print('ran')\n"
    )
    done = subprocess.run(
        [sys.executable, "trial.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"


def test_the_example_is_short():
    family = blocks("python")[1]
    code = [line for line in family.splitlines() if line.strip()]
    assert len(code) <= 27


def test_the_tables_name_every_family_and_every_short_name():
    for family in ("clip", "siglip", "timm", "dinov2", "dinov3"):
        assert f"| `{family}` |" in PAGE
        assert family in vit.families()
    rows = re.findall(
        r"^\| `(vit[^|]*) \| `(vit_[^`]*)` \| `(vit[^|]*) \| `(vit_[^`]*)` \|$", PAGE, re.M
    )
    tables: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for row in rows:
        for table, (names, timm_name) in zip(tables, (row[:2], row[2:]), strict=True):
            for short in re.findall(r"[\w]+", names):
                table[short] = timm_name
    for table, family, names in zip(
        tables, ("dinov2", "dinov3"), (dino.DINOV2, dino.DINOV3), strict=True
    ):
        assert set(names) <= set(table)
        for short, timm_name in table.items():
            assert dino.timm_name(family, names, short) == timm_name
