"""What the live explorer answers, compared with the results that it is about."""

import io
import json
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image
from visuals.chain import HOSTILE_CLASS

from saev import storage
from saev.explorer import data
from saev.explorer.columns import COLUMNS
from saev.inference.results import Results
from saev.nn.io.load import load_sae
from saev.serve.measured import Measured
from saev.shards import Shards
from saev.visuals.source import Source
from saev.visuals.stored import Pictures

from .conftest import Client


def unpack(data: bytes) -> dict[str, Any]:
    """Columns by name, as docs/explorer.md describes them."""
    length = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + length])
    found = {}
    for one in head["columns"]:
        start = 4 + length + one["start"]
        array = np.frombuffer(data, "<" + one["dtype"], one["length"], start)
        if "dictionary" in one:
            found[one["name"]] = [one["dictionary"][i] if i >= 0 else None for i in array]
        else:
            found[one["name"]] = array
    return found


@pytest.fixture(scope="module")
def results(measured: Measured) -> Results:
    return Results.open(measured.results.url)


@pytest.fixture(scope="module")
def of_run(measured: Measured) -> str:
    return f"/api/runs/{measured.key}"


def test_the_root_lists_all_saes(client: Client, root: str) -> None:
    found = client.get("/api/root")
    assert found["root"] == root
    assert found["problems"] == []
    assert [sae["measured"] for sae in found["saes"]].count(True) == 2
    assert sorted(sae["config"]["sae"]["activation"]["top_k"] for sae in found["saes"]) == [2, 4, 6]
    measured = [sae for sae in found["saes"] if sae["measured"]]
    for sae in measured:
        metrics = Results.open(sae["inference"]).metrics
        assert (sae["all_nmse"], sae["all_l0"]) == (metrics["normalized_mse"], metrics["l0"])


def test_columns_are_those_of_the_results(client: Client, of_run: str, results: Results) -> None:
    found = unpack(client.ask(f"{of_run}/columns")[2])
    assert np.array_equal(found["n_tokens"], results.counts)
    assert np.array_equal(found["frequency"], results.frequency)
    fires = results.counts > 0
    np.testing.assert_allclose(found["mean"][fires], results.mean_values[fires], rtol=1e-6)
    assert np.array_equal(found["max"][fires], results.max_values[fires])
    assert np.isnan(found["mean"][~fires]).all()
    assert found["best_class_name"] == results.latents()["best_class_name"].to_pylist()
    some = unpack(client.ask(f"{of_run}/columns?names=max,name")[2])
    assert list(some) == ["max", "name"]


def test_figures_are_those_of_the_file_of_all_latents(
    client: Client, of_run: str, results: Results, root: str
) -> None:
    """The two ways to make them share nothing but the list of what they are."""
    shards = Shards.open(next(entry.url for entry in storage.list_dir(f"{root}/shards")))
    other = data.Measured(results, shards, {0: "noise", 1: "x", 2: "ramp"})
    facts = client.get(of_run)
    found = unpack(client.ask(f"{of_run}/figures")[2])
    shown = [one for one in COLUMNS if one.key in found]
    assert [one["key"] for one in facts["figures"]] == [one.key for one in shown]
    assert len(shown) >= 10
    for one in shown:
        has_sides = one.has_sides and other.has_held_out
        expected = other.column(one, held_out=has_sides)
        np.testing.assert_allclose(found[one.key], expected, rtol=1e-6, err_msg=one.key)
        if has_sides:
            expected = other.column(one, held_out=False)
            np.testing.assert_allclose(found[f"{one.key}_all"], expected, rtol=1e-6)
    assert found["order"].tolist() == other.order.tolist()
    assert np.array_equal(found["tokens"], other.n_tokens)
    strongest = [results.top(i).example_idx[:1].tolist() for i in range(results.d_sae)]
    assert found["top_example"].tolist() == [one[0] if one else -1 for one in strongest]
    numbers = {one["class"]: i for i, one in enumerate(facts["classes"])}
    for key in ("class", "mask"):
        assert [numbers.get(i, -1) for i in found[key].tolist()] == other.best(key).tolist()
    assert [(c["name"], c["kind"], c["support"]) for c in facts["classes"]][:2] == [
        tuple(one) for one in other.classes
    ][:2]


def test_classes_of_masks_have_their_names(client: Client, of_run: str) -> None:
    """classes.csv beside the images says them."""
    classes = client.get(f"{of_run}/classes")["classes"]
    names = {one["value"]: one["name"] for one in classes if one["kind"] == "mask"}
    assert names == {0: "noise", 1: HOSTILE_CLASS, 2: "ramp", 3: "class 3"}


def test_the_best_latents_of_a_class_are_named(
    client: Client, of_run: str, results: Results
) -> None:
    table = results.classes().to_pylist()
    for one in client.get(f"{of_run}/classes")["classes"]:
        mine = [row["latent"] for row in table if row["class_idx"] == one["class"]]
        assert [row["latent"] for row in one["best"]] == mine[:8]


def test_first_images_of_many_latents_come_at_once(client: Client, of_run: str) -> None:
    found = client.get(f"{of_run}/examples?latents=3,7,8&n=2")
    assert list(found) == ["3", "7", "8"]
    for latent, rows in found.items():
        whole = client.get(f"{of_run}/latents/{latent}")["examples"]
        assert [(r["example"], r["patch_values"]) for r in rows] == [
            (r["example"], r["patch_values"]) for r in whole[:2]
        ]


def test_a_latent_is_that_of_the_results(client: Client, of_run: str, results: Results) -> None:
    latent = int(results.counts.argmax())
    found = client.get(f"{of_run}/latents/{latent}")
    table = results.latents()
    row = table.filter(pc.equal(table["latent"], latent)).to_pylist()[0]
    assert found["figures"] == row
    top = results.top(latent)
    shown = [one for one in found["examples"] if one["kind"] == "top"]
    assert [one["example"] for one in shown] == top.example_idx.tolist()
    for one, acts in zip(shown, top.token_acts, strict=True):
        assert one["patches"] == np.flatnonzero(acts).tolist()
        np.testing.assert_allclose(one["patch_values"], acts[acts != 0], rtol=1e-3)
        assert one["path"].endswith(".png")
    classes = results.classes()
    mine = classes.filter(pc.equal(classes["latent"], latent))
    assert [one["class"] for one in found["classes"]] == [
        row["class_idx"]
        for row in sorted(mine.to_pylist(), key=lambda r: (-r["ap"], r["class_idx"]))
    ]


def test_images_of_a_latent_are_ranked_and_chosen(
    client: Client, of_run: str, results: Results
) -> None:
    latent = int(results.counts.argmax())
    acts = results.latent_acts(latent)
    label_of = dict(zip(*results.images(["example", "class_idx"]).columns, strict=True))
    label_of = {k.as_py(): v.as_py() for k, v in label_of.items()}
    rows = [(r["example"], r["max"], r["mean"]) for r in acts.to_pylist()]
    for order, key in (("max", 1), ("mean", 2)):
        ranked = sorted(rows, key=lambda r: (-r[key], r[0]))
        found = client.get(f"{of_run}/latents/{latent}/images?order={order}&from=1&n=3")
        assert found["n"] == len(rows)
        assert [(i["example"], i["max"], i["mean"]) for i in found["images"]] == ranked[1:4]
    found = client.get(f"{of_run}/latents/{latent}/images?class=1&n=500")
    assert {i["example"] for i in found["images"]} == {r[0] for r in rows if label_of[r[0]] == 1}
    high = sorted(r[1] for r in rows)[len(rows) // 2]
    found = client.get(f"{of_run}/latents/{latent}/images?high={high}&order=example")
    assert [i["example"] for i in found["images"]] == sorted(r[0] for r in rows if r[1] <= high)


def test_an_image_has_its_latents_and_codes(client: Client, of_run: str, results: Results) -> None:
    codes = results.codes().toarray()
    example_idx, token_idx = results.code_tokens()
    for example in (0, 7):
        found = client.get(f"{of_run}/images/{example}/tokens")
        dense = np.zeros((results.content_tokens, results.d_sae))
        dense[found["patch"], found["latent"]] = found["value"]
        mine = example_idx == example
        expected = np.zeros_like(dense)
        expected[token_idx[mine]] = codes[mine]
        np.testing.assert_allclose(dense, expected, rtol=1e-3)
        image = client.get(f"{of_run}/images/{example}")
        peaks = dict(zip(image["latents"]["latent"], image["latents"]["max"], strict=True))
        assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
        for latent, peak in peaks.items():
            assert peak == pytest.approx(expected[:, latent].max(), rel=1e-3)
        few = client.get(
            f"{of_run}/images/{example}/tokens?latents={image['latents']['latent'][0]}"
        )
        assert set(few["latent"]) == {image["latents"]["latent"][0]}


def test_two_groups_are_compared_by_their_rates(
    client: Client, of_run: str, results: Results
) -> None:
    images = results.images(["example", "class_idx"]).to_pylist()
    inside = {row["example"] for row in images if row["class_idx"] == 0}
    floor = results.tables.index.facts["image_floor"]
    peaks = np.zeros((len(images), results.d_sae))
    example_idx, _ = results.code_tokens()
    np.maximum.at(peaks, example_idx, results.codes().toarray())
    fires = peaks >= floor * results.max_values
    fires &= peaks > 0
    is_in = np.array([row["example"] in inside for row in images])
    first, second = fires[is_in].mean(axis=0), fires[~is_in].mean(axis=0)
    found = client.get(f"{of_run}/compare?a=class:0&b=rest")
    assert [group["n"] for group in found["groups"]] == [is_in.sum(), (~is_in).sum()]
    for row in found["first"] + found["second"]:
        assert row["rates"] == pytest.approx([first[row["latent"]], second[row["latent"]]])
    assert {row["latent"] for row in found["first"]} == set(np.flatnonzero(first > second).tolist())
    assert {row["latent"] for row in found["second"]} == set(
        np.flatnonzero(first < second).tolist()
    )


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("latents/48", 404, "There is no latent 48: the SAE has 48."),
        ("latents/-1", 400, "no number"),
        ("latents/99999999999999999999", 400, "no number"),
        ("latents/0/images?order=size", 400, "There is no order 'size'."),
        ("latents/0/images?low=x", 400, "low is 'x', no number."),
        ("images/12", 404, "There is no image 12"),
        ("images/12/tokens", 404, "There is no image 12"),
        ("pictures/12/48", 404, "There is no image 12"),
        ("pictures/0/49", 404, "There are no pictures of 49 pixels."),
        ("classes/99", 404, "There is no class 99"),
        ("columns?names=max,b", 404, "There is no column 'b'."),
        ("compare?a=rest&b=rest", 400, "rest of the other"),
        ("compare?a=class:x", 400, "is no group of images"),
        ("compare?a=images:99", 404, "There are no images in"),
        ("nothing", 404, "is nothing that this server answers"),
    ],
)
def test_a_wrong_question_gets_one_sentence_and_a_remedy(
    client: Client, of_run: str, path: str, status: int, said: str
) -> None:
    found, headers, data = client.ask(f"{of_run}/{path}")
    assert (found, headers["Content-Type"]) == (status, "application/problem+json")
    problem = json.loads(data)
    assert said in problem["detail"]
    assert problem["remedy"]
    assert problem["status"] == status


def test_what_was_not_measured_says_what_to_run(client: Client) -> None:
    (sae,) = [sae for sae in client.get("/api/root")["saes"] if not sae["measured"]]
    status, _, data = client.ask(f"/api/runs/{sae['key']}/columns")
    assert status == 409
    assert "saev inference --run" in json.loads(data)["remedy"]
    assert client.get(f"/api/runs/{sae['key']}/curves")["step"]


def test_pictures_are_kept_by_the_browser(client: Client, of_run: str) -> None:
    status, headers, data = client.ask(f"{of_run}/pictures/3/48")
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert data[8:12] == b"WEBP"
    assert "max-age" in headers["Cache-Control"]
    again = client.ask(f"{of_run}/pictures/3/48", If_None_Match=headers["ETag"])
    assert (again[0], again[2]) == (304, b"")


def test_pictures_are_those_of_the_report(client: Client) -> None:
    sae = next(one for one in client.get("/api/root")["saes"] if one["top_k"] == 4)
    stored = Pictures.open(f"{sae['inference']}/report")
    example = int(stored.examples[0])
    place = f"/api/runs/{sae['key']}/pictures/{example}"
    assert client.ask(f"{place}/224")[2] == stored.get(example)
    assert client.ask(f"{place}/48")[2] == stored.thumb(example)


def test_pictures_without_a_report_are_made_of_the_originals(
    client: Client, of_run: str, measured: Measured
) -> None:
    crop = Source(Shards.open(measured.entry.figures["shards"])).view(5).image
    for size, side in ((48, 48), (224, 64)):  # never larger than what the model saw
        found = Image.open(io.BytesIO(client.ask(f"{of_run}/pictures/5/{size}")[2]))
        assert found.size == (side, side)
        expected = np.asarray(crop.resize(found.size, Image.Resampling.LANCZOS), dtype=float)
        off = np.abs(np.asarray(found.convert("RGB")) - expected)
        assert off[:, -side // 4 :].mean() < 3  # the gradient, which tells images apart


def test_matches_are_the_nearest_decoder_rows(client: Client, of_run: str) -> None:
    saes = {sae["key"]: sae for sae in client.get("/api/root")["saes"]}
    rows = {
        key: load_sae(sae["run"]).W_dec.detach().double().numpy()
        for key, sae in saes.items()
        if sae["measured"]
    }
    (mine,) = [key for key in rows if key in of_run]
    (other,) = [key for key in rows if key != mine]
    unit = {key: w / np.linalg.norm(w, axis=1, keepdims=True) for key, w in rows.items()}
    for latent in (0, 7):
        cosines = unit[other] @ unit[mine][latent]
        (found,) = client.get(f"{of_run}/latents/{latent}/matches")["matches"]
        assert (found["run"], found["latent"]) == (other, int(cosines.argmax()))
        assert found["cosine"] == pytest.approx(cosines.max(), abs=1e-5)
