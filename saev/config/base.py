"""The base of all config models."""

import contextlib
import contextvars
import json
import typing as tp
from collections.abc import Iterator, Mapping

import pydantic

from saev import secrets, storage
from saev.errors import ConfigError

Dtype = tp.Literal["float32", "float16", "bfloat16"]
Tokens = tp.Literal["content", "special", "all"]
"""Which tokens of an example: its content tokens, its special tokens (the class token), or both."""


def _check_file_name(name: str) -> str:
    if not storage.is_file_name(name):
        raise ValueError("expected the name of a file beside this one")
    return name


FileName = tp.Annotated[str, pydantic.AfterValidator(_check_file_name)]
"""The name that a stored record gives to a file of its own folder."""


_are_flags = contextvars.ContextVar("saev_are_flags", default=False)


class FlagError(Exception):
    """Values of flags that a config refuses.

    Args:
        wrong: the key of each (the last part of the flag's name; empty if it is about several
            flags), and what is wrong with it.
    """

    def __init__(self, wrong: list[tuple[str, str]]):
        super().__init__("; ".join(text for _, text in wrong))
        self.wrong = wrong


@contextlib.contextmanager
def of_flags() -> Iterator[None]:
    """Until the block ends, configs that refuse their values raise FlagError.

    A parser of command lines takes pydantic's error for one of its own, and prints it as it is.
    """
    token = _are_flags.set(True)
    try:
        yield
    finally:
        _are_flags.reset(token)


def refuse(text: str) -> tp.NoReturn:
    """Raise what a validator of a whole config finds wrong with several of its values together."""
    if _are_flags.get():
        raise FlagError([("", text)])
    raise ValueError(text)


class Config(pydantic.BaseModel):
    """Immutable, and an unknown key is an error.

    Integral floats are accepted for integers because KFP's local runner turns JSON integers into
    floats.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    added: tp.ClassVar[frozenset[str]] = frozenset()
    """Keys that were added after version 0.1.0. :meth:`identity` leaves out those that have their
    default value."""
    removed: tp.ClassVar[Mapping[str, str]] = {}
    """Keys that only earlier versions had, each with the key that replaced it ("" for none).
    Configs that have them still parse."""

    hides_keys: tp.ClassVar[bool] = False
    """Whether secret keys in URLs are hidden instead of refused: for records that saev makes of
    texts that others stored, such as labels."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _of_flags(
        cls, raw: tp.Any, handler: pydantic.ModelWrapValidatorHandler[tp.Self]
    ) -> tp.Self:
        """Give errors of flags to whoever knows the flags."""
        try:
            return handler(raw)
        except pydantic.ValidationError as err:
            if _are_flags.get():
                raise FlagError([_wrong(item) for item in err.errors()]) from err
            raise

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_removed(cls, raw: tp.Any) -> tp.Any:
        """Move the values of removed keys to the keys that replaced them, and drop the others."""
        if not isinstance(raw, dict) or not cls.removed.keys() & raw.keys():
            return raw
        kept = {key: value for key, value in raw.items() if key not in cls.removed}
        for old, new in cls.removed.items():
            if old in raw and new:
                kept.setdefault(new, raw[old])
        return kept

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_keys(cls, raw: tp.Any, info: pydantic.ValidationInfo) -> tp.Any:
        """Refuse URLs that hold a secret key, because a config is shown, stored and hashed."""
        if cls.hides_keys:
            return _without_keys(raw)
        if isinstance(raw, dict) and not (info.context or {}).get("stored"):
            for key, value in _texts(raw):
                if secrets.holds_key(value):
                    raise ValueError(f"{key}: {secrets.refusal(value)}")
        return raw

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: tp.Any) -> None:
        """Make each description one line, so that help texts are wrapped for the terminal only."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            if field.description:
                field.description = " ".join(field.description.split())

    def to_dict(self) -> dict[str, tp.Any]:
        """As plain JSON types."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, tp.Any]:
        """:meth:`to_dict` for hashing: without keys that were added later and have their default.

        So a name that an earlier version made from a hash stays the same in this version.
        """
        plain = self.to_dict()
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.added and value == field.get_default(call_default_factory=True):
                del plain[name]
            else:
                plain[name] = _identity(value, plain[name])
        return plain

    @classmethod
    def from_dict(cls, raw: tp.Any, *, source: str = "config", stored: bool = False) -> tp.Self:
        """Validate plain JSON types. Raises ConfigError that names the key.

        Args:
            raw: plain JSON types.
            source: what errors call the config.
            stored: whether an earlier version may have written the config. Then a URL with a secret
                key in it is no error.
        """
        try:
            return cls.model_validate(raw, context={"stored": stored})
        except pydantic.ValidationError as err:
            raise ConfigError(describe_validation_error(err, source)) from err


def _identity(value: tp.Any, plain: tp.Any) -> tp.Any:
    """The identity of a value, which is ``plain`` as JSON, and of the configs inside it."""
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, tuple | list):
        return [_identity(v, p) for v, p in zip(value, plain, strict=True)]
    if isinstance(value, dict):
        return {key: _identity(v, plain[key]) for key, v in value.items()}
    return plain


def _without_keys(value: tp.Any) -> tp.Any:
    """Plain JSON types, with the secret keys of URLs hidden."""
    if isinstance(value, str):
        return secrets.redact(value)
    if isinstance(value, dict):
        return {key: _without_keys(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_keys(inner) for inner in value]
    return value


def _texts(value: tp.Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts inside plain JSON types, each with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{i}")


def describe_validation_error(err: pydantic.ValidationError, source: str) -> str:
    """One line per wrong key: where it stands, what was found, what is wrong with it."""
    lines = [f"{key or '(top level)'}: {text}" for key, text in map(_wrong, err.errors())]
    return f"Invalid {source}: " + "; ".join(lines)


def _wrong(item: tp.Any) -> tuple[str, str]:
    """The dotted key of one of pydantic's errors, and what is wrong with its value."""
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown key"
    if item["type"] not in ("missing", "value_error"):
        message += f" (found {_short(item['input'])})"
    return ".".join(str(part) for part in item["loc"]), message


def _short(value: tp.Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
