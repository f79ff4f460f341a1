"""Job configurations: flat dataclasses, read from flat YAML and from `--field value`."""

import dataclasses
import datetime
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")
_SCALARS = (str, int, float, bool, datetime.date, type(None))  # YAML takes some texts for dates


def load_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Build a job's dataclass from a YAML file and `--field value` arguments, which win.

    Args:
        cls: the dataclass.
        path: flat YAML file; None for defaults.
        overrides: ["--learning_rate", "1e-5", ...]; a list field takes all values up to the next `--`,
            and where it is named again those too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a flat mapping, an unknown key, a missing field or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    if path is not None:
        for name, value in _read_yaml(path).items():
            _check_known(name, fields, str(path))
            try:
                values[name] = _convert(value, hints[name], name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    listed: dict[str, list[Any]] = {}
    for name, words in _pair_up(overrides):
        _check_known(name, fields, "the command line")
        values[name] = _convert(_from_words(words, hints[name], name), hints[name], name)
        if isinstance(values[name], list):
            values[name] = listed[name] = listed.get(name, []) + values[name]
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"`{missing[0]}` is needed: set it in the configuration file or with --{missing[0]} VALUE.")
    return cls(**values)


def changed_fields(job: Any, but: Sequence[str] = ()) -> list[str]:
    """The names of a dataclass's fields that have another value than by default, less those in `but`."""
    fields = (field for field in dataclasses.fields(job) if field.name not in but)
    return [field.name for field in fields if getattr(job, field.name) != _default_of(field)]


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def describe_fields(cls: type, path: str | Path | None = None) -> str:
    """The dataclass's fields as help text: name, default, or what the YAML file at `path` has, and the help of the metadata."""
    lines, given = [], {} if path is None else _read_yaml(path)
    for field in dataclasses.fields(cls):
        if field.name in given:
            value = given[field.name]
        else:
            value = _default_of(field)
        default = "required" if value is dataclasses.MISSING else f"default {'none' if value is None else repr(value)}"
        lines.append(f"  --{field.name}  {field.metadata.get('help', '')} ({default})")
    return "\n".join(lines)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`config`: there is no file {path}; examples are in examples/configs/.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # the others of a text that is none, and of its numbers
        raise ValueError(f"`config`: {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"`config`: {path} must be a flat mapping of `field: value` lines.")
    for name, value in content.items():
        if not all(isinstance(item, _SCALARS) for item in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"`config`: {path} must be a flat mapping of `field: value` lines: `{name}` has to be text, a number, true "
                "or false, or a list of these."
            )
    return content


def _check_known(name: str, fields: dict, where: str) -> None:
    if name not in fields:
        close = difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean `{close[0]}`?" if close else "it is not a field."
        raise ValueError(f"`{name}` in {where} is unknown: {hint} Known fields: {', '.join(fields)}.")


def _pair_up(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    pairs: list[tuple[str, list[str]]] = []
    for word in overrides:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif not pairs:
            raise ValueError(f"`{word}`: expected --field value, for example --max_steps 100.")
        else:
            pairs[-1][1].append(word)
    return pairs


def _from_words(words: list[str], hint: Any, name: str) -> Any:
    is_list = any(typing.get_origin(part) is list for part in _alternatives(hint))
    if is_list:
        return words
    if not words and bool in _alternatives(hint):
        return True
    if len(words) != 1:
        raise ValueError(f"`{name}` takes one value, got {words}.")
    return words[0]


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as one of the types in `hint`; YAML reads 1e-5 as text, the command line reads everything as text."""
    alternatives = _alternatives(hint)
    if value in ("null", "none", "None") and type(None) in alternatives:  # elsewhere it may be a choice
        return None
    if value is None:
        if type(None) in alternatives:
            return None
        raise ValueError(f"`{name}` must not be empty.")
    for kind in alternatives:
        origin = typing.get_origin(kind)
        if origin is list:
            items = value if isinstance(value, list) else [value]
            return [_convert(item, typing.get_args(kind)[0], name) for item in items]
        if origin is typing.Literal:
            if value in typing.get_args(kind):
                return value
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}.")
        if kind is bool and str(value).lower() in ("true", "false", "yes", "no", "1", "0"):
            return str(value).lower() in ("true", "yes", "1")
        if kind is int and re.fullmatch(r"[+-]?\d+", str(value)):  # as a float it would lose what is beyond 2^53
            return int(value)
        if kind in (int, float) and not isinstance(value, bool | list):
            try:
                number = float(value)
            except (ValueError, TypeError, OverflowError):
                continue
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
        if kind is str and not isinstance(value, list):
            return str(value)
        if kind is Path:
            return Path(value)
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in alternatives if kind is not type(None))
    raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")
