"""Checks the parameters of a run before it is sent. KFP's client does not check them."""

import collections.abc
import json
import logging
import re
import typing as tp

from pipelines import budget
from pipelines.definition import Compiled, Parameter
from pipelines.options import PodOptions
from saev.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

_KINDS = {
    "STRING": "a text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_PAIR = re.compile(r"(?P<key>[A-Za-z_]\w*)=")
_NEXT = re.compile(r"\s+[A-Za-z_]\w*=")
_TOLERATION = {
    "key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int,
}  # fmt: skip
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
PODS: dict[str, Parameter] = {
    key: Parameter(
        {"str": "STRING", "dict": "STRUCT", "list": "LIST"}[type(default).__name__],
        default,
        required=False,
        description=" ".join((field.description or "").split()),
    )
    for key, field in PodOptions.model_fields.items()
    for default in [field.get_default(call_default_factory=True)]
}
"""Values that users set like parameters, but that are compiled into the pipeline."""
_INTERNAL = ("claim", "start")
"""Parameters that schedules and firings set. Users do not set them."""
_LARGEST = 100_000
"""Most characters of the config. A pod gets it as one argument, which Linux limits to 128 KiB."""


def parse(texts: collections.abc.Sequence[str]) -> dict[str, tp.Any]:
    """KEY=VALUE pairs, one or several in a text: ``n_parts=2 node_selector={"gpu": "a100"}``.

    A JSON value ends where the JSON ends, also if it contains spaces. Any other value ends before
    the next ``KEY=``.

    Returns:
        parameter → its text. :func:`check` converts it to its type.

    Raises:
        ConfigError: a text is no KEY=VALUE, a parameter is given twice, or JSON is incomplete.
    """
    values: dict[str, tp.Any] = {}
    for text in texts:
        rest = text.strip()
        while rest or not text.strip():
            found = _PAIR.match(rest)
            if found is None:
                raise ConfigError(f"Parameter {rest!r} is not KEY=VALUE, such as n_parts=2.")
            key = found["key"]
            if key in values:
                raise ConfigError(f"Parameter {key} is given twice; keep one of them.")
            values[key], rest = _first_value(key, rest[found.end() :])
    return values


def _first_value(key: str, text: str) -> tuple[str, str]:
    """The value at the start of a text, and the rest of the text."""
    if text[:1] in ("{", "[", '"'):
        try:
            end = json.JSONDecoder().raw_decode(text)[1]
        except ValueError as err:
            raise ConfigError(
                f"Parameter {key} begins like JSON, but is no JSON: {text!r} ({err}). Correct it."
            ) from None
        if text[end : end + 1].strip():
            raise ConfigError(
                f"Parameter {key} has {text[end:]!r} after its JSON. Remove it, or put a space "
                "before it."
            )
        return text[:end], text[end:].strip()
    following = _NEXT.search(text)
    end = len(text) if following is None else following.start()
    return text[:end].strip(), text[end:].strip()


def check(compiled: Compiled, values: dict[str, tp.Any], source: str) -> dict[str, tp.Any]:
    """Convert values to the types of the pipeline, and leave out those that are compiled into it.

    Args:
        compiled: the pipeline.
        values: parameter → value, or its text.
        source: where the values come from, for errors.

    Raises:
        ConfigError: a name is unknown, or a value has the wrong type.
    """
    checked = {}
    known = {key: p for key, p in compiled.parameters.items() if key not in _INTERNAL}
    for key, value in values.items():
        if key in PODS:
            continue
        if key not in known:
            names = [*known, *PODS]
            raise ConfigError(
                f"Pipeline {compiled.name} has no parameter {key!r} ({source})."
                f"{did_you_mean(key, names)} It has: {', '.join(names)}."
            )
        checked[key] = _value(key, value, known[key], source)
    return checked


def check_pods(values: tp.Mapping[str, tp.Any], source: str) -> dict[str, tp.Any]:
    """The same for the values that are compiled into the pipeline. Raises ConfigError."""
    return {
        key: _value(key, value, PODS[key], source) for key, value in values.items() if key in PODS
    }


def complete(
    compiled: Compiled, values: dict[str, tp.Any], *, chosen: tp.Container[str] = ("n_parts",)
) -> dict[str, tp.Any]:
    """Check that no parameter is missing, and that the run is not too large. Returns the values.

    Args:
        compiled: the pipeline.
        values: the checked values.
        chosen: names of the parameters that were given for this run. If ``n_parts`` is not among
            them and is too large, it is made smaller, with a warning.

    Raises:
        ConfigError: one is missing, the config is too long, or the run could become too large.
    """
    for key, parameter in compiled.parameters.items():
        if parameter.required and key not in values:
            raise ConfigError(
                f"Pipeline {compiled.name} needs the parameter {key}: {parameter.description}"
            )
    size = len(json.dumps(values.get("config", {})))
    if size > _LARGEST:
        raise ConfigError(
            f"The config and its sweep are {size:,} characters of JSON; a pod can be given "
            f"{_LARGEST:,}. Split the sweep into several runs."
        )
    defaults = {key: p.default for key, p in compiled.parameters.items() if not p.required}
    if "n_parts" not in chosen:
        values = _smaller(compiled, values, defaults)
    budget.check(compiled, {**defaults, **values})
    return values


def _smaller(
    compiled: Compiled, values: dict[str, tp.Any], defaults: dict[str, tp.Any]
) -> dict[str, tp.Any]:
    """The values with an n_parts that fits. Earlier versions of saev accepted larger ones."""
    full = {**defaults, **values}
    if "n_parts" not in full or budget.n_bytes(compiled, full) <= budget.MOST:
        return values
    most = budget.most_parts(compiled, full)
    if not most:
        return values
    logger.warning(
        "n_parts is %d instead of %d: with more pods, a run becomes too large for Kubeflow's UI "
        "(docs/pipeline.md, the size of a run). A pod does several parts one after the other. %s",
        most, full["n_parts"], budget.FOR_MORE,
    )  # fmt: skip
    return {**values, "n_parts": most}


def _value(key: str, value: tp.Any, parameter: Parameter, source: str) -> tp.Any:
    if isinstance(value, str) and parameter.kind != "STRING":
        try:
            value = json.loads(value)
        except ValueError:
            raise _wrong(key, value, parameter, source) from None
    elif parameter.kind == "STRING" and isinstance(value, int | float) and value is not True:
        value = str(value)  # gpu_count = 2 in a TOML file
    is_right = {
        "STRING": isinstance(value, str),
        "NUMBER_INTEGER": _is_number(value) and float(value).is_integer(),
        "NUMBER_DOUBLE": _is_number(value),
        "BOOLEAN": isinstance(value, bool),
        "LIST": isinstance(value, list),
        "STRUCT": isinstance(value, dict),
    }[parameter.kind]
    if not is_right:
        raise _wrong(key, value, parameter, source)
    if parameter.kind == "NUMBER_INTEGER":
        value = int(value)
    elif parameter.kind == "NUMBER_DOUBLE":
        value = float(value)
    return _plausible(key, value, source)


def _is_number(value: tp.Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(key: str, value: tp.Any, parameter: Parameter, source: str) -> ConfigError:
    return ConfigError(
        f"Parameter {key} ({source}) is {value!r}, expected {_KINDS[parameter.kind]}: "
        f"{parameter.description}"
    )


def _plausible(key: str, value: tp.Any, source: str) -> tp.Any:
    """Refuse values that Kubernetes would refuse hours later, when the first GPU pod is made."""

    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"Parameter {key} ({source}) is {value!r}, expected {expected}.")

    if key in ("cpu", "memory") and not _QUANTITY.fullmatch(value):
        raise wrong("a Kubernetes quantity such as 4, 500m or 32Gi (not 32GB)")
    if key in ("gpu_count", "train_gpus") and not value.isdigit():
        raise wrong("a whole number of GPUs, 0 for none")
    if key == "train_nodes" and not (value.isdigit() and int(value) >= 1):
        raise wrong("a whole number of machines, at least 1")
    if key in ("n_parts", "max_datasets") and value < 1:
        raise wrong("at least 1")
    if key == "max_retries" and value < 0:
        raise wrong("at least 0")
    if key in ("storage_secret", "config_map", "pvc_name", "image_pull_secret"):
        if not _NAME.fullmatch(value):
            raise wrong("a Kubernetes name: small letters, digits, dashes and dots")
    elif key == "queue" and value and not _NAME.fullmatch(value):
        raise wrong("a Kubernetes name, or an empty text")
    elif key == "node_selector" and not all(isinstance(v, str) for v in value.values()):
        raise wrong('labels with texts as values, such as {"gpu": "a100"}')
    elif key == "tolerations" and not all(map(_is_toleration, value)):
        raise wrong(
            f"a list of objects with the keys {', '.join(_TOLERATION)}, such as "
            '[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]'
        )
    return value


def _is_toleration(value: tp.Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(v, _TOLERATION.get(k, ())) for k, v in value.items())
        and value.get("operator", "Equal") in ("Equal", "Exists")
        and value.get("effect", _EFFECTS[0]) in _EFFECTS
    )
