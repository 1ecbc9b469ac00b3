"""Requests and responses checked against the swagger file of KFP's API."""

import copy
import json
import re
import typing as tp
from pathlib import Path

import jsonschema

FILE = Path(__file__).with_name("kfp_api_v2beta1.swagger.json")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


class ViolationError(Exception):
    """A request or response that the swagger file does not allow."""


class Operation(tp.NamedTuple):
    """One method of one path."""

    name: str
    """operationId."""
    parameters: dict[str, dict[str, tp.Any]]
    """By name, with `in`."""
    schema: dict[str, tp.Any]
    """Of the answer with status 200."""
    in_path: dict[str, str]
    """Values of the parameters in this request's path."""


class Swagger:
    """The file, strict: what it does not name is a violation."""

    def __init__(self) -> None:
        self._raw = json.loads(FILE.read_text(encoding="utf-8"))
        definitions = copy.deepcopy(self._raw["definitions"])
        for definition in definitions.values():
            _close(definition)
        self._definitions = definitions
        self._paths = [(_pattern(path), item) for path, item in self._raw["paths"].items()]

    def operation(self, method: str, path: str) -> Operation:
        """What a request asks for. Raises ViolationError if there is no such operation."""
        for pattern, item in sorted(self._paths, key=lambda pair: -len(pair[0].pattern)):
            found = pattern.fullmatch(path)
            raw = item.get(method.lower())
            if found and raw:
                parameters = {p["name"]: p for p in raw.get("parameters", [])}
                in_path = {
                    key.replace("__", "."): value for key, value in found.groupdict().items()
                }
                schema = raw["responses"]["200"]["schema"]
                return Operation(raw["operationId"], parameters, schema, in_path)
        raise ViolationError(f"the API has no {method} {path}")

    def check_query(self, operation: Operation, query: dict[str, list[str]]) -> None:
        """Only known parameters, each once, of the right type."""
        for key, values in query.items():
            parameter = operation.parameters.get(key)
            if parameter is None or parameter["in"] != "query":
                raise ViolationError(f"{operation.name} has no query parameter {key}")
            if len(values) != 1:
                raise ViolationError(f"{operation.name}: {key} is given {len(values)} times")
            if parameter["type"] == "integer" and not re.fullmatch(r"-?\d+", values[0]):
                raise ViolationError(f"{operation.name}: {key} is {values[0]!r}, not an integer")
            if key == "filter" and values[0]:
                self.check(json.loads(values[0]), {"$ref": "#/definitions/v2beta1Filter"}, "filter")

    def check_body(self, operation: Operation, body: tp.Any) -> None:
        """A body where the operation has one, and of its schema."""
        schemas = [p["schema"] for p in operation.parameters.values() if p["in"] == "body"]
        if not schemas:
            if body is not None:
                raise ViolationError(f"{operation.name} takes no body, got {body!r}")
            return
        self.check(body, schemas[0], f"body of {operation.name}")

    def check(self, value: tp.Any, schema: dict[str, tp.Any], what: str) -> None:
        """Raises ViolationError unless a value is of a schema."""
        whole = {**schema, "definitions": self._definitions}
        checker = jsonschema.FormatChecker(formats=())
        checker.checks("date-time")(lambda text: bool(_TIME.fullmatch(str(text))))
        checker.checks("int64")(lambda text: bool(re.fullmatch(r"-?\d+", str(text))))
        validator = jsonschema.Draft4Validator(whole, format_checker=checker)
        for error in validator.iter_errors(value):
            where = "/".join(str(part) for part in error.absolute_path)
            raise ViolationError(f"{what}: {where or 'top level'}: {error.message[:300]}")


def _close(schema: tp.Any) -> None:
    """Unknown keys become errors, in this schema and in those inside it."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    if "$ref" in schema:  # draft 4 ignores what stands beside it, as generators of swagger do
        for key in set(schema) - {"$ref"}:
            del schema[key]
    for value in list(schema.values()):
        _close(value)


def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{([^}]+)\}", path)
    text = "".join(
        f"(?P<{part.replace('.', '__')}>[^/:]+)" if i % 2 else re.escape(part)
        for i, part in enumerate(parts)
    )
    return re.compile(text)
