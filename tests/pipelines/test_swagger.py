"""The checks of the test server can fail, so that the client's tests can."""

import typing as tp
import urllib.parse

import pytest
from swagger import Swagger, ViolationError

SWAGGER = Swagger()


def _request(method: str, url: str, body: tp.Any = None) -> None:
    parts = urllib.parse.urlsplit(url)
    operation = SWAGGER.operation(method, parts.path)
    SWAGGER.check_query(operation, urllib.parse.parse_qs(parts.query))
    SWAGGER.check_body(operation, body)


RUNS = "/apis/v2beta1/runs"
FILTER = urllib.parse.quote('{"predicates": [{"operation": "EQUALS", "key": "x"}]}')
BAD_FILTER = urllib.parse.quote('{"predicates": [{"operation": "SAME", "key": "x"}]}')


@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("GET", f"{RUNS}?page_size=5&sort_by=created_at%20desc&filter={FILTER}", None),
        ("GET", f"{RUNS}/abc", None),
        ("POST", f"{RUNS}/abc:terminate", None),
        ("POST", RUNS, {"display_name": "a", "runtime_config": {"parameters": {"x": [1]}}}),
        ("POST", "/apis/v2beta1/recurringruns", {"max_concurrency": "1", "mode": "ENABLE"}),
    ],
)
def test_right_requests_pass(method: str, url: str, body: tp.Any) -> None:
    _request(method, url, body)


@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("GET", "/apis/v1beta1/runs", None),
        ("PUT", RUNS, None),
        ("POST", f"{RUNS}/abc:stop", None),
        ("GET", f"{RUNS}?page_size=many", None),
        ("GET", f"{RUNS}?limit=5", None),
        ("GET", f"{RUNS}?page_size=5&page_size=6", None),
        ("GET", f"{RUNS}?filter={BAD_FILTER}", None),
        ("GET", RUNS, {"display_name": "a"}),
        ("POST", RUNS, {"name": "a"}),
        ("POST", RUNS, {"display_name": 1}),
        ("POST", RUNS, {"runtime_config": {"params": {}}}),
        ("POST", RUNS, {"created_at": "yesterday"}),
        ("POST", RUNS, {"state": "DONE"}),
        ("POST", RUNS, None),
        ("POST", "/apis/v2beta1/recurringruns", {"max_concurrency": 1}),
        ("POST", "/apis/v2beta1/recurringruns", {"mode": "ENABLED"}),
        ("POST", "/apis/v2beta1/recurringruns", {"trigger": {"cron": "0 0 3 * * *"}}),
    ],
)
def test_wrong_requests_do_not(method: str, url: str, body: tp.Any) -> None:
    with pytest.raises(ViolationError):
        _request(method, url, body)


def test_wrong_answers_do_not() -> None:
    schema = SWAGGER.operation("GET", RUNS).schema
    SWAGGER.check({"runs": [{"run_id": "a"}]}, schema, "answer")
    with pytest.raises(ViolationError, match="runs/0"):
        SWAGGER.check({"runs": [{"id": "a"}]}, schema, "answer")
