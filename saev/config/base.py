"""The base of all config models."""

import contextlib
import contextvars
import json
import types
import typing as tp
from collections.abc import Iterator, Mapping

import pydantic

from saev import secrets, storage
from saev.errors import ConfigError, did_you_mean

Dtype = tp.Literal["float32", "float16", "bfloat16"]
Tokens = tp.Literal["content", "special", "all"]
"""Which tokens of an example: its content tokens, its special tokens (the class token), or both."""


def _check_file_name(name: str) -> str:
    if not storage.is_file_name(name):
        raise ValueError("expected the name of a file beside this one")
    return name


FileName = tp.Annotated[str, pydantic.AfterValidator(_check_file_name)]
"""Name of a file in the folder of the stored record that contains this name."""


_are_flags = contextvars.ContextVar("saev_are_flags", default=False)


class FlagError(Exception):
    """A config refuses values of command-line flags.

    Args:
        wrong: for each value its key (the last part of the flag's name; empty if several flags are
            meant) and the message.
    """

    def __init__(self, wrong: list[tuple[str, str]]):
        super().__init__("; ".join(text for _, text in wrong))
        self.wrong = wrong


@contextlib.contextmanager
def of_flags() -> Iterator[None]:
    """In this block, configs raise FlagError instead of pydantic's error.

    The parser of command lines would catch pydantic's error and print it unchanged.
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
    """Base of all configs: immutable, and unknown keys are errors.

    Floats without a fraction are accepted as integers, because KFP's local runner turns JSON
    integers into floats.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    added: tp.ClassVar[frozenset[str]] = frozenset()
    """Keys that were added after version 0.1.0. :meth:`identity` leaves them out if they have their
    default value."""
    removed: tp.ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, each with the key that replaced it ("" for none). Configs with
    these keys still parse. A key without a replacement does nothing."""

    hides_keys: tp.ClassVar[bool] = False
    """Whether secrets in URLs are hidden instead of refused. This is for records with texts that
    other programs stored, such as labels."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _of_flags(
        cls, raw: tp.Any, handler: pydantic.ModelWrapValidatorHandler[tp.Self]
    ) -> tp.Self:
        """Inside :func:`of_flags`, raise FlagError."""
        try:
            return handler(raw)
        except pydantic.ValidationError as err:
            if _are_flags.get():
                raise FlagError([_wrong(item, cls) for item in err.errors()]) from err
            raise

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_removed(cls, raw: tp.Any) -> tp.Any:
        """Move the values of removed keys to the keys that replaced them. Drop those without a
        replacement."""
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
        """Refuse URLs that contain a secret, because configs are shown, stored and hashed."""
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
        """:meth:`to_dict` for hashing, without ``added`` keys that have their default value.

        So hashes, and the names made from them, stay the same in later versions.
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
            source: name of the config in errors.
            stored: whether an earlier version may have written the config. Then a secret in a URL
                is not an error.
        """
        try:
            return cls.model_validate(raw, context={"stored": stored})
        except pydantic.ValidationError as err:
            raise ConfigError(describe_validation_error(err, source, cls)) from err


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
    """Plain JSON types, with secrets in URLs hidden."""
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


def describe_validation_error(
    err: pydantic.ValidationError, source: str, model: type[Config] | None = None
) -> str:
    """All errors in one line. Each has the key, the message, and the value that was found.

    Args:
        err: the errors.
        source: name of the config.
        model: the config's class, whose keys are suggested for misspelt ones; None for data that no
            person writes.
    """
    wrong = (_wrong(item, model) for item in err.errors())
    lines = [f"{key or '(top level)'}: {text}" for key, text in wrong]
    return f"Invalid {source}: " + "; ".join(lines)


def _wrong(item: tp.Any, model: type[Config] | None) -> tuple[str, str]:
    """The dotted key and the message of one of pydantic's errors."""
    message = item["msg"].removeprefix("Value error, ")
    is_unknown = item["type"] == "extra_forbidden"
    if is_unknown:
        message = "unknown key"
    if item["type"] not in ("missing", "value_error"):
        message += f" (found {_short(item['input'])})"
    if is_unknown and model and (hint := _nearest(item["loc"], model)):
        message += f".{hint}"
    return ".".join(str(part) for part in item["loc"]), message


def _nearest(loc: tuple[int | str, ...], model: type[Config]) -> str:
    """A hint about the key that was meant: this one in another table, or one of this table."""
    tables = [model]
    for part in loc[:-1]:
        inner = [m for table in tables for m in _at(table, part)]
        of_kind = [m for m in tables if _kind(m) == part]
        tables = inner or of_kind or tables  # an index of a list changes nothing
    word = str(loc[-1])
    if elsewhere := next(_paths(model, word), ""):
        return did_you_mean(elsewhere, [elsewhere])
    return did_you_mean(word, [key for table in tables for key in table.model_fields])


def _paths(model: type[Config], word: str) -> Iterator[str]:
    """The dotted keys of a config whose last part is a word."""
    for key in model.model_fields:
        if key == word:
            yield key
        for inner in _at(model, key):
            yield from (f"{key}.{path}" for path in _paths(inner, word))


def _at(model: type[Config], key: int | str) -> list[type[Config]]:
    """The configs that a key of a config may have as value."""
    field = model.model_fields.get(str(key))
    return configs_in(field.annotation) if field else []


def _kind(model: type[Config]) -> tp.Any:
    """The kind by which pydantic names a member of a union."""
    field = model.model_fields.get("kind")
    return field.default if field else None


def configs_in(annotation: tp.Any) -> list[type[Config]]:
    """The config classes of an annotation: the class itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if tp.get_origin(annotation) is tp.Annotated:
        return configs_in(tp.get_args(annotation)[0])
    if tp.get_origin(annotation) in (tp.Union, types.UnionType):
        return [m for arg in tp.get_args(annotation) for m in configs_in(arg)]
    return []


def _short(value: tp.Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
