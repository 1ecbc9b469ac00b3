"""The base of all config models."""

import json
import typing as tp

import pydantic

from saev import storage
from saev.errors import ConfigError

Dtype = tp.Literal["float32", "float16", "bfloat16"]
Tokens = tp.Literal["content", "special", "all"]
"""Which tokens of an example: its content tokens, its special tokens (the class token), or both."""


class Config(pydantic.BaseModel):
    """Immutable, and an unknown key is an error.

    Integral floats are accepted for integers because KFP's local runner turns JSON integers into
    floats.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def to_dict(self) -> dict[str, tp.Any]:
        """As plain JSON types."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, raw: tp.Any, *, source: str = "config") -> tp.Self:
        """Validate plain JSON types. Raises ConfigError that names the key."""
        try:
            return cls.model_validate(raw)
        except pydantic.ValidationError as err:
            raise ConfigError(describe_validation_error(err, source)) from err

    @classmethod
    def from_url(cls, url: str) -> tp.Self:
        """Read a JSON config."""
        return cls.from_dict(storage.read_json(url), source=storage.normalize(url))


def describe_validation_error(err: pydantic.ValidationError, source: str) -> str:
    """One line per wrong key: where it stands, what was found, what is wrong with it."""
    lines = []
    for item in err.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        found = (
            ""
            if item["type"] in ("missing", "value_error")
            else f" (found {_short(item['input'])})"
        )
        lines.append(f"{key}: {message}{found}")
    return f"Invalid {source}: " + "; ".join(lines)


def _short(value: tp.Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
