"""Who may ask the live explorer, and what for."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from saev.errors import SaevError, StorageError
from saev.serve import access, app, problems
from saev.serve.access import Rules
from saev.serve.catalogue import Catalogue
from saev.serve.explorer import Explorer

from .conftest import Client, serving


@pytest.fixture(scope="module")
def explorer(root: str) -> Explorer:
    return Explorer(Catalogue.of(root), memory_mb=1024)


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("127.0.0.1:1", True), ("localhost", True), ("LOCALHOST:80", True), ("[::1]:80", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("", False),
        ("evil.example:80@127.0.0.1", False),
    ],
)  # fmt: skip
def test_the_name_of_another_site_gets_nothing(client: Client, host: str, may: bool) -> None:
    status, _, data = client.ask("/api/root", Host=host)
    assert status == (200 if may else 403)
    assert may or b"saes" not in data


def test_a_script_of_another_site_gets_nothing(client: Client) -> None:
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask("/api/root", Origin=own)[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{own}.evil.example"):
        assert client.ask("/api/root", Origin=origin)[0] == 403, origin
    foreign = {"Sec_Fetch_Site": "cross-site"}
    assert client.ask("/api/root", **foreign, Sec_Fetch_Mode="no-cors")[0] == 403
    assert client.ask("/", **foreign, Sec_Fetch_Mode="navigate")[0] == 200
    assert client.ask("/api/root", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0] == 200


def test_every_answer_has_a_policy(client: Client) -> None:
    for path in ("/", "/api/root", "/nothing", "/static/explorer.js"):
        headers = client.ask(path)[1]
        assert "script-src 'self';" in headers["Content-Security-Policy"]
        assert "'unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].endswith("frame-ancestors 'self'")
    embedded = client.ask("/?embed=1")[1]["Content-Security-Policy"]
    assert embedded.endswith("frame-ancestors 'self' http://localhost:* http://127.0.0.1:*")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/static/../app.py", "/static/%2e%2e%2fapp.py", "/static/app.py",
        "/pages/../photos/labels.csv", "/pages/%2e%2e/secret.html", "/pages//etc/passwd.html",
        "/pages/runs", "/pages/photos/labels.csv", "/api/runs/..%2f..%2fphotos/columns",
        "/api/runs/../columns", "/runs/",
    ],
)  # fmt: skip
def test_paths_lead_nowhere_else(client: Client, path: str) -> None:
    status, _, data = client.ask(path)
    assert status == 404
    assert json.loads(data)["title"] == "Not found"


def test_only_reading_is_answered(client: Client) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.ask("/api/root", method)[0] == 405, method
    status, headers, data = client.ask("/api/root", "HEAD")
    assert (status, data) == (200, b"")
    assert int(headers["Content-Length"]) > 100


def test_another_address_needs_the_token(explorer: Explorer) -> None:
    rules = Rules.of("0.0.0.0", (), "/saev")
    assert len(rules.token) >= 32
    assert Rules.of("0.0.0.0", (), "").token != rules.token
    with serving(app.make(explorer, rules, "/saev")) as client:
        status, headers, data = client.ask("/api/root")
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert b"saes" not in data
        assert client.ask("/api/root", Authorization=f"Bearer {rules.token}")[0] == 200
        assert client.ask("/api/root", Authorization=f"Bearer {rules.token}x")[0] == 401
        assert (
            client.ask("/api/root", Authorization="Bearer ü".encode().decode("latin-1"))[0] == 401
        )
        assert client.ask("/saev/?token=wrong")[0] == 401
        status, headers, _ = client.ask(f"/saev/?embed=1&token={rules.token}")
        assert (status, headers["Location"]) == (303, "./?embed=1")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Path=/saev/" in cookie
        named = cookie.partition(";")[0]
        assert client.ask("/saev/api/root", Cookie=named)[0] == 200
        assert client.ask("/saev/", Cookie="saev_token=x")[0] == 401
        assert client.ask("/healthz")[2] == b"ok\n"


def test_a_proxy_that_is_named_needs_none(explorer: Explorer) -> None:
    rules = Rules.of("0.0.0.0", ("Explorer.example.org",), "")
    assert not rules.token
    with serving(app.make(explorer, rules)) as client:
        assert client.ask("/api/root", Host="explorer.example.org")[0] == 200
        assert client.ask("/api/root", Host="other.example.org")[0] == 403
        named = {"Host": "127.0.0.1:80", "Origin": "https://explorer.example.org"}
        assert client.ask("/api/root", **named)[0] == 200


def test_a_prefix_may_stay_or_be_taken_off(explorer: Explorer) -> None:
    with serving(app.make(explorer, Rules.of("127.0.0.1", (), "/a/b"), "/a/b")) as client:
        assert client.get("/a/b/api/root") == client.get("/api/root")
        status, headers, _ = client.ask("/a/b")
        assert (status, headers["Location"]) == (307, "/a/b/")
        page = client.ask("/a/b/")[2].decode()
        assert 'src="static/explorer.js"' in page
        assert client.ask("/a/bc")[0] == 404


def test_a_large_body_is_refused(client: Client) -> None:
    too_large = str(access.MAX_BODY + 1)
    assert client.ask("/api/notes", "PUT", Content_Length=too_large)[0] == 413


@pytest.fixture
def broken(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    def fail() -> Any:
        raise ValueError("s3://AKIAKEY:very/secret@bucket")

    monkeypatch.setattr(explorer.catalogue, "to_dict", fail)
    with serving(app.make(explorer, Rules.of("127.0.0.1", (), ""))) as client:
        yield client


def test_an_error_of_its_own_tells_nothing(
    broken: Client, caplog: pytest.LogCaptureFixture
) -> None:
    status, headers, data = broken.ask("/api/root")
    assert (status, headers["Content-Type"]) == (500, "application/problem+json")
    assert b"secret" not in data
    assert b"ValueError" not in data
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text.partition("ValueError: ")[2]


def test_notes_are_not_lost(root: str, tmp_path: Path) -> None:
    from saev.serve.notes import check

    place = tmp_path / "notes.json"
    explorer = Explorer(Catalogue.of(root), 1024, check(str(place)))
    with serving(app.make(explorer, Rules.of("127.0.0.1", (), ""))) as client:
        _, headers, data = client.ask("/api/notes")
        assert json.loads(data) == {}
        first = headers["ETag"]
        status, headers, _ = client.ask("/api/notes", "PUT", b'{"a":1}', If_Match=first)
        assert (status, place.read_text()) == (204, '{"a":1}')
        # Two have read the first version: the later one is told, and nothing is lost.
        assert client.ask("/api/notes", "PUT", b'{"b":2}', If_Match=first)[0] == 412
        assert client.ask("/api/notes", "PUT", b'{"b":2}')[0] == 428
        assert place.read_text() == '{"a":1}'
        second = headers["ETag"]
        assert client.ask("/api/notes")[1]["ETag"] == second
        for wrong in (b"[]", b"{", b"\xff"):
            assert client.ask("/api/notes", "PUT", wrong, If_Match=second)[0] == 400
        many = b'{"a":"' + b"x" * (5 << 20) + b'"}'
        assert client.ask("/api/notes", "PUT", many, If_Match=second)[0] == 413
        foreign = {"If_Match": second, "Origin": "http://evil.example"}
        assert client.ask("/api/notes", "PUT", b"{}", **foreign)[0] == 403


def test_without_a_file_of_notes_there_are_none(client: Client) -> None:
    assert client.ask("/api/notes")[0] == 404
    assert client.get("/api/root")["notes"] is False


def test_a_folder_that_is_no_root_is_told(tmp_path: Path) -> None:
    with pytest.raises(SaevError, match=r"is neither a root nor a run: it has no folder runs"):
        Catalogue.of(str(tmp_path))
    with pytest.raises(SaevError, match=r"There is nothing at .*missing"):
        Catalogue.of(str(tmp_path / "missing"))


def test_results_of_earlier_versions_say_what_to_do() -> None:
    """The root that version 0.1.0 wrote: listed, without tables, with its pages."""
    root = Path(__file__).parents[1] / "upgrade" / "root" / "saev"
    explorer = Explorer(Catalogue.of(str(root)), memory_mb=1024)
    with serving(app.make(explorer, Rules.of("127.0.0.1", (), ""))) as client:
        saes = client.get("/api/root")["saes"]
        assert len(saes) == 5
        status, _, data = client.ask(f"/api/runs/{saes[0]['key']}")
        assert status == 409
        assert "by an earlier version, without tables" in json.loads(data)["detail"]
        assert "run the same `saev inference` command again" in json.loads(data)["remedy"]
        assert client.ask("/pages/")[0] == 200


def test_a_damaged_run_hides_no_other(root: str, tmp_path: Path) -> None:
    shutil.copytree(f"{root}/runs", tmp_path / "runs", ignore=shutil.ignore_patterns("inference"))
    damaged = sorted((tmp_path / "runs").iterdir())[0]
    (damaged / "run.json").write_text("{")
    found = Catalogue.of(str(tmp_path)).to_dict()
    assert len(found["saes"]) == 2
    (problem,) = found["problems"]
    assert damaged.name in problem


def test_a_message_is_cut_before_its_remedy(explorer: Explorer) -> None:
    request = Request({"type": "http", "path": "/", "headers": [], "query_string": b""})
    answer = problems.of_error(
        request, StorageError("s3://b/x is gone. It was 3.5 MB. Put it back.")
    )
    found = json.loads(answer.body)
    assert (found["detail"], found["remedy"]) == (
        "s3://b/x is gone. It was 3.5 MB.",
        "Put it back.",
    )
