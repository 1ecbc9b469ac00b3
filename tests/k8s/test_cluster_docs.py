"""What docs/cluster.md shows is there and is well-formed."""

import json
import re
from pathlib import Path

import yaml

from k8s.checks import meaning
from k8s.conftest import ROOT, Render

PAGE = (ROOT / "docs" / "cluster.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def block(language: str) -> list[str]:
    """The page's code blocks of a language, wherever they are indented to."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)


def test_make_targets_and_variables_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    shown = re.findall(r"(?:^|`)\s*make ([a-z]+)((?:\s+\[?[A-Z_]+=\S+)*)", PAGE, re.MULTILINE)
    assert {target for target, _ in shown} <= targets
    for _, variables in shown:
        for name in re.findall(r"([A-Z_]+)=", variables):
            assert name in MAKEFILE, name


def test_files_exist() -> None:
    for path in re.findall(r"\bcp (\S+)", PAGE) + re.findall(
        r"kubectl \w+ -[kf] (k8s/[\w./-]+)", PAGE
    ):
        assert (ROOT / path).exists(), path


def test_json_is_json() -> None:
    (policy,) = block("json")
    assert json.loads(policy)["Statement"]
    patches = re.findall(r"COMPILED_PIPELINE_SPEC_PATCH='([^']+)'", PAGE)
    assert len(patches) == 2
    for patch in map(json.loads, patches):
        if "podSpecPatch" in patch:
            assert "fsGroup" in json.loads(patch["podSpecPatch"])["securityContext"]


def test_the_narrower_overlay_builds(build: Render, tree: Path) -> None:
    (text,) = block("yaml")
    content = yaml.safe_load(text.replace("../saev/k8s", f"../{tree.name}"))
    mine = tree.parent / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(content))
    objects = build(mine)
    assert meaning(objects) == []
    (policy,) = (item for item in objects if item["metadata"]["name"] == "saev-https")
    assert "0.0.0.0/0" not in json.dumps(policy)
