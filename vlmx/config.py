"""A YAML file and key=value overrides -> one validated, frozen configuration; all problems at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vlmx.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


def load_config(model: type[C], path: Path | None, overrides: list[str], **values: Any) -> C:
    """Merge a YAML file, then `values` (options of the command line), then "key.path=value" overrides, and validate.

    Args:
        model: the configuration class.
        path: YAML file, or None for the defaults.
        overrides: items like "optim.lr=1e-4"; values are read as YAML scalars.
        values: top-level keys given as command options; None means "not given".

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; every problem is listed.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the configuration {path}", why=str(error)) from error
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration {path} is not a mapping of keys to values")
    data.update({key: value for key, value in values.items() if value is not None})
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{item}' is not an override", fix="write key=value, e.g. optim.lr=1e-4")
        _set(data, key.split("."), _scalar(text), item)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_problem(model, entry) for entry in error.errors()]
        raise ConfigError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration"
            + (f" {path}" if path else ""),
            why="; ".join(problems),
            fix="correct the keys named above",
        ) from error


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(data: dict[str, Any], keys: list[str], value: Any, item: str) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"'{item}' does not fit", why=f"'{key}' is a value, not a group of keys")
    data[keys[-1]] = value


def _problem(model: type[BaseModel], entry: Any) -> str:
    location = [str(part) for part in entry["loc"]]
    key = ".".join(location)
    if entry["type"] != "extra_forbidden":
        return f"{key}: {entry['msg']}"
    group: Any = model
    for part in location[:-1]:
        field = group.model_fields.get(part) if isinstance(group, type) and issubclass(group, BaseModel) else None
        group = field.annotation if field else None
    known = sorted(group.model_fields) if isinstance(group, type) and issubclass(group, BaseModel) else []
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean '{'.'.join([*location[:-1], near[0]])}'?" if near else f"known: {', '.join(known)}"
    return f"{key} is not known ({hint})"
