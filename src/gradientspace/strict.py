"""Nested values, as YAML and the command line give them, into dataclasses: strictly, with the nearest name.

An unknown key is refused with the known name that is closest to it, a value of another type with the type that fits.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from gradientspace.errors import ConfigError


def override(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """`values` with `--section.option value` pairs put in; `=` may join the two."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
        odd = next((word for word in words[::2] if not word.startswith("--")), words[-1] if words else "")
        raise ConfigError(f"cannot read {odd!r}: options are pairs, --section.option value")
    values = copy.deepcopy(values)
    for flag, value in zip(words[::2], words[1::2], strict=True):
        *sections, option = flag.removeprefix("--").replace("-", "_").split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{flag} does not name an option: {section!r} is not a section")
        place[option] = parse_yaml(value, f"{shown(value)}, the value of {flag},")
    return values


def parse_yaml(text: str, what: str) -> Any:
    """YAML of plain values. Raises `ConfigError` that begins with `what`, the place of the text."""
    try:
        return yaml.safe_load(text)
    # PyYAML checks the grammar, and lets Python's constructors fail on a date or number that is none.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{what} is not valid YAML{where}: {_reason(error)}") from error


def shown(value: Any) -> str:
    """`repr`, also of a whole number with more digits than Python prints, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 160 else f"{text[:120]}… ({len(text)} characters)"


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error or type(error).__name__).splitlines()[0]


def differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: left -> right` for every leaf in which two nested dicts differ."""
    lines = []
    for key in [*left, *(k for k in right if k not in left)]:
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def build(cls: type, values: Any, where: str = "") -> Any:
    """An instance of the dataclass `cls` from nested dicts; `where` names the place in errors (`ConfigError`)."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the config'} must be a mapping of options, not {shown(values)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(_unknown_key(f"{where}.{key}" if where else str(key), str(key), list(hints)))
        arguments[key] = _convert(hints[key], value, f"{where}.{key}" if where else key)
    return cls(**arguments)


def _unknown_key(full: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown config key {full!r}; {hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint; build dataclasses inside lists. int is accepted where float is asked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {_encodable(str(k), where): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is type(None) and value is None:
        return None
    elif hint is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif isinstance(hint, type) and type(value) is hint:
        return _encodable(value, where) if isinstance(value, str) else value
    raise ConfigError(f"{where} is {shown(value)}; it must be {_describe(hint)}")


def _encodable(text: str, where: str) -> str:
    """Half of a surrogate pair, which YAML can spell, fits in no file and no tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} is {shown(text)}, which holds half of a surrogate pair: remove it") from error
    return text


def _as_float(value: Any) -> float | None:
    """YAML 1.1 reads `1e-3` as a string; people mean the number."""
    if isinstance(value, bool):
        return None
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("empty" if a is type(None) else _describe(a) for a in arguments)
    if origin is list:
        return "a list"
    if origin is dict:
        return "a mapping"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
