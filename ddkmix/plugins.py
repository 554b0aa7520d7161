"""Build an object from `{name: ..., parameter: ...}`: a name out of a literal dict, or `package.module:Name`.

The two tables of the project are `POLICIES` and `LOSSES`. An entry is a frozen dataclass whose fields
are its parameters, so that a plug-in brings its own, checked here before anything expensive starts.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ddkmix.errors import ConfigError, did_you_mean


def build(spec: Mapping[str, Any], table: Mapping[str, type], *, where: str, key: str = "name") -> Any:
    """The object that `spec` names, with its parameters checked.

    Args:
        spec: `name` and the parameters of that entry.
        table: name -> frozen dataclass.
        where: the place in the config, for messages ("policy", "loss.1").
        key: what `name` is called in this spec.

    Raises:
        ConfigError: the name or a parameter is unknown, or a value breaks its rule.
    """
    name = spec.get(key)
    if not isinstance(name, str):
        raise ConfigError(f"{where}.{key} is missing; {did_you_mean('', table)}")
    cls = _import(name, where=f"{where}.{key}") if ":" in name else table.get(name)
    if cls is None:
        raise ConfigError(f"{where}.{key} = {name!r} is unknown; {did_you_mean(name, table)}")
    parameters = {other: value for other, value in spec.items() if other != key}
    _check_names(cls, parameters, where=f"{where} ({name})")
    try:
        return TypeAdapter(cls).validate_python(parameters)
    except ValidationError as error:
        first, *others = error.errors()
        field = str(first["loc"][0]) if first["loc"] else ""
        # a field of several types has an error for each of them
        same = [other for other in others if field and str(other["loc"][0]) == field]
        rules = [found["msg"].removeprefix("Value error, ") for found in (first, *same)]
        at = f"{where}.{field} = {parameters[field]!r}" if field in parameters else f"{where}.{field}"
        raise ConfigError(f"{at.rstrip('.')}: {'; '.join(dict.fromkeys(rules))}.") from None


def _import(target: str, *, where: str) -> type:
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where} = {target!r} cannot be imported ({error}); it must be package.module:Name "
            "of an installed or PYTHONPATH module."
        ) from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{where} = {target!r} is not a dataclass; make it a frozen one.")
    return found


def _check_names(cls: type, parameters: Mapping[str, Any], *, where: str) -> None:
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in parameters:
        if key not in known:
            raise ConfigError(
                f"{where} has no parameter {key!r}; {did_you_mean(key, known) if known else 'it has none.'}"
            )
