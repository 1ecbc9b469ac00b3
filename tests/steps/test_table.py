"""The Markdown page of a run: that texts of users show as they are, and where links go."""

import re

import pytest

from saev.config import TrainConfig
from saev.steps import table
from saev.visuals.overview import Section
from saev.visuals.rows import Row


def row(run: str, nmse: float, held_out: float | None, *, on_front: bool = True) -> Row:
    metrics = {
        "normalized_mse": nmse, "explained_variance": 1 - nmse, "l0": 8.0, "n_dead": 3, "d_sae": 64,
    }  # fmt: skip
    known = {} if held_out is None else {"normalized_mse": held_out}
    return Row(
        f"s3://b/out/runs/{run}", f"s3://b/out/runs/{run}/inference/i/report/index.html",
        TrainConfig(), metrics, known, name=f"name|of*{run}", on_front=on_front,
    )  # fmt: skip


def render(*rows: Row, dataset: str = "s3://b/pets") -> str:
    return table.render(Section("abc", dataset, rows), "s3://b/out/index.html", "run-1")


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def rows_of(page: str) -> list[list[str]]:
    """Cells, as a parser of Markdown divides them: at bars that are not escaped."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[c.strip(" \u2002") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_best_of_held_out_images_is_first() -> None:
    head, first, second = rows_of(render(row("a", 0.1, 0.3), row("b", 0.2, 0.2, on_front=False)))
    assert len(head) == len(first) == len(second)
    assert first[1].endswith("(best)")
    assert (first[2], second[2]) == ("0.2000", "0.3000")
    assert head[2] == "NMSE, held\u00a0out"
    assert (first[0], second[0]) == ("\u00a01", "◆\u00a02")
    assert first[-1] == "`b`"


def test_without_held_out_images_all_of_them_decide() -> None:
    head, first, second = rows_of(render(row("a", 0.2, 0.1), row("b", 0.1, None)))
    assert (first[-1], first[2]) == ("`b`", "0.1000")
    assert (second[-1], second[2]) == ("`a`", "0.2000")
    assert head[2] == "NMSE, all\u00a0images"


def test_texts_of_users_are_no_markup() -> None:
    page = render(row("a", 0.1, 0.1), dataset="s3://b/[x](javascript:1)<b>_p_")
    assert r"\[x\](javascript:1)\<b\>\_p\_" in page
    assert r"name\|of\*a" in page


def test_keys_of_urls_are_hidden() -> None:
    assert "SHH" not in render(row("a", 0.1, 0.1), dataset="s3://AKIA:SHH@b/pets?sig=SHH")


def test_the_run_is_linked_in_the_ui_wherever_that_is() -> None:
    assert "[this run in Kubeflow](#/runs/details/run-1)" in render(row("a", 0.1, 0.1))


@pytest.mark.parametrize(
    ("url", "env", "expected"),
    [
        ("s3://b/out/runs", {}, "https://console.aws.amazon.com/s3/buckets/b?prefix=out/runs/"),
        (
            "s3://b/out/index.html", {},
            "https://console.aws.amazon.com/s3/object/b?prefix=out/index.html",
        ),
        ("s3://b/out", {"AWS_ENDPOINT_URL": "http://minio:9000"}, ""),
        ("s3://b/out", {"AWS_DEFAULT_REGION": "cn-north-1"}, ""),
        ("gs://b/a b", {}, "https://console.cloud.google.com/storage/browser/b/a%20b"),
        ("abfs://b/out", {}, ""),
        ("/data/saev", {}, ""),
    ],
)  # fmt: skip
def test_consoles(
    url: str, env: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert table.console(url) == expected
