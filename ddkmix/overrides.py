"""YAML texts and `key=value` overrides as plain trees of dicts and lists; `config` says what they mean."""

import re
from typing import Any

import yaml

from ddkmix.errors import ConfigError

Tree = dict[str, Any]


class _Yaml(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does; to YAML 1.1 it is a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text; nothing in it is executed.

    Raises:
        ValueError: it is not YAML; the message is one line.
    """
    try:
        return _Yaml(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets the errors of its constructors through: 2024-99-99, !!int x, !!bool x, [[[[...
        raise ValueError(" ".join(str(error).split())) from None


def apply_override(tree: Tree, override: str) -> None:
    """Set one value: `trainer.steps=20`, or with a position in a list `loss.1.weight=0.3`.

    Raises:
        ConfigError: it is not key=value, or its key leads through a value or past the end of a list.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must be key=value, as in trainer.steps=20.")
    try:
        value = read_yaml(text)
    except ValueError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value.") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_position(node, part, override)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if isinstance(child, bool):  # `guards: off`
        word = "on" if child else "off"
        raise ConfigError(
            f"override {override!r}: {part} is {word}; set it whole, as in {part}={{name: value}}."
        )
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {part} is the value {child!r}, not a section.")
    return child


def _position(node: list[Any], part: str, override: str) -> int:
    positions = [str(i) for i in range(len(node))]
    if part not in positions:
        raise ConfigError(f"override {override!r}: {part!r} is no position in a list of {len(node)}.")
    return positions.index(part)
