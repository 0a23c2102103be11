"""Settings as dataclasses that check themselves: one declaration gives the type, the range, the error and the JSON Schema.

The road not taken is pydantic: the plan must run on the standard library alone, and a setting's message must name its
dotted path, what came and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

from sat_core.plan.errors import ConfigError

MAX_LIST = 16
MAX_NUMBER: Any = sys.float_info.max
# Each limit of a number: what holds, in words, and in JSON Schema.
_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str, str]] = {
    "ge": (operator.ge, "at least", "minimum"),
    "gt": (operator.gt, "above", "exclusiveMinimum"),
    "le": (operator.le, "at most", "maximum"),
    "lt": (operator.lt, "below", "exclusiveMaximum"),
}


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and its limits (`ge`, `gt`, `le`, `lt`, `choices`)."""
    return field(default=default, metadata={"doc": doc, **limits})


def limited(default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A field with limits, documented by its class; without a default it must be given."""
    return field(default=default, metadata=limits)


def build(cls: type, value: Any, path: str) -> Any:
    """`cls` from the JSON object `value` found at `path`; None is all defaults.

    Raises:
        ConfigError: naming the setting, what came and what is allowed.
    """
    if value is None:
        return cls()
    refuse_unknown(value, tuple(f.name for f in dataclasses.fields(cls)), path)
    return cls(**checked(cls, value, f"{path}."))


def checked(cls: type, values: typing.Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of fields of `cls`, each of its type and within its limits; `path` goes before the names in errors.

    Raises:
        ConfigError: naming the setting, what came and what is allowed.
    """
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    return {n: _check(hints[n], v, path + n, fields[n]) for n, v in values.items()}


def refuse_unknown(value: Any, known: tuple[str, ...], path: str) -> None:
    """Refuse keys that are not `known`, with the nearest that is."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {value!r}; allowed is an object.", path)
    for name in value:
        if name in known:
            continue
        dotted = f"{path}.{name}" if path else str(name)
        raise ConfigError(
            f"{dotted} is not a known setting.{_nearest(name, known)} Allowed here: {', '.join(known)}.",
            dotted,
            "unknown_parameter",
        )


def _nearest(name: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _check(hint: Any, value: Any, path: str, spec: dataclasses.Field[Any] | None) -> Any:
    """The value as `hint` has it; `spec` is None for an entry of a list, which has no default."""
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if optional:
        if value is None or value == "auto":
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type", hint), value, path)
    if value is None and spec and spec.default is not dataclasses.MISSING:
        return spec.default
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            allowed = f"{', '.join(choices)}.{_nearest(value, choices)}"
            raise ConfigError(f"{path} is {value!r}; allowed: {allowed}", path)
        return value
    if typing.get_origin(hint) is tuple:
        return _check_list(typing.get_args(hint)[0], value, path)
    if hint in (bool, str):
        if not isinstance(value, hint) or value == "":
            kind = "true or false" if hint is bool else "a string that is not empty"
            raise ConfigError(f"{path} is {value!r}; allowed is {kind}.", path)
        return value
    return _number(hint, value, path, spec.metadata if spec else {}, optional=optional)


def _check_list(item: Any, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_LIST:
        raise ConfigError(f"{path} is {value!r}; allowed is a list of at most {MAX_LIST}.", path)
    return tuple(_check(item, entry, f"{path}.{i}", None) for i, entry in enumerate(value))


def _number(
    hint: Any, value: Any, path: str, limits: typing.Mapping[str, Any], *, optional: bool
) -> int | float:
    kind = "an integer" if hint is int else "a number"
    good = (
        not isinstance(value, bool) and isinstance(value, numbers.Real) and abs(value) <= MAX_NUMBER
    )
    if good and hint is int:
        good = float(value).is_integer()
    known = {name: limits[name] for name in _LIMITS if name in limits}
    if not (good and all(_LIMITS[name][0](value, limit) for name, limit in known.items())):
        allowed = " and ".join(f"{_LIMITS[name][1]} {limit:g}" for name, limit in known.items())
        allowed = f"{kind} {allowed}".rstrip() + (", or auto" if optional else "")
        raise ConfigError(f"{path} is {value!r}; allowed is {allowed}.", path)
    return int(value) if hint is int else float(value)


def plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def json_schema(hint: Any, spec: dataclasses.Field[Any] | None = None) -> dict[str, Any]:
    """JSON Schema (2020-12) of a settings class or of one field of it."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        properties = {f.name: json_schema(hints[f.name], f) for f in dataclasses.fields(hint)}
        return {
            "type": "object",
            "description": (hint.__doc__ or "").strip(),
            "properties": properties,
            "additionalProperties": False,
        }
    limits = spec.metadata if spec else {}
    if isinstance(hint, types.UnionType):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        number = json_schema(inner, spec)
        description = number.pop("description", "")
        return {"anyOf": [number, {"const": "auto"}, {"type": "null"}], "description": description}
    out: dict[str, Any] = {"description": limits.get("doc", "")}
    if typing.get_origin(hint) is Literal:
        out |= {"type": "string", "enum": list(typing.get_args(hint))}
    elif typing.get_origin(hint) is tuple:
        items = json_schema(typing.get_args(hint)[0])
        out |= {"type": "array", "items": items, "maxItems": MAX_LIST}
    elif hint in (bool, str):
        out |= {"type": "boolean"} if hint is bool else {"type": "string", "minLength": 1}
    else:
        out |= {"type": "integer" if hint is int else "number"}
    out |= {schema: limits[k] for k, (_, _, schema) in _LIMITS.items() if k in limits}
    if spec is not None and spec.default is not dataclasses.MISSING:
        out["default"] = plain(spec.default)
    return out
