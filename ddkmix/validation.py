"""What pydantic finds wrong with a tree of settings, in one line for its author."""

from collections.abc import Sequence
from types import UnionType
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError

from ddkmix.errors import did_you_mean


def explain(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    """What is wrong first, where, and the rule, in one line."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        known = _fields_at(root, parts[:-1])
        prefix = "".join(f"{part}." for part in parts[:-1])
        return f"unknown key {key} in {where}; {did_you_mean(key, [prefix + name for name in known])}"
    if first["type"] == "missing":
        return f"{key} is missing in {where}; it has no default."
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key + ': ' if key else ''}{rule} (in {where})."
    if first["type"] == "tuple_type":
        given = first["input"]
        rule = f"it must be a list{f': [{given}]' if isinstance(given, str | int | float) else ''}"
    if first["type"] == "model_type":
        rule = "it must be a section of settings, as in {name: value}"
    return f"{key} = {first['input']!r} in {where}; {rule[0].lower()}{rule[1:]}."


def _fields_at(root: type[BaseModel], parts: Sequence[str]) -> list[str]:
    section, names = root, list(parts)
    while names:
        annotation = section.model_fields[names.pop(0)].annotation
        if get_origin(annotation) is dict and names:  # sections by name
            annotation, _ = get_args(annotation)[1], names.pop(0)
        if get_origin(annotation) is UnionType:  # a section that may be left out
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
