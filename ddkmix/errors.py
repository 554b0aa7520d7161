"""The exception tree.

    DdkmixError            every error that a user can cause; the CLI prints it as one line, exit code 2
    ├── ConfigError        a config, an override or an argument is wrong
    ├── DataError          a domain card, a shard or a packed row is wrong
    │   ├── RowError       a packed row is not the one that was packed (substituted, within a limit)
    │   ├── StorageError   a store cannot be reached or does not have the file (never taken for bad data)
    │   └── MixtureExhausted   no domain may serve another row (every one is at its max_epochs or unwanted)
    ├── ModelError         a model or a tokenizer cannot be used as asked
    ├── NumericsError      a loss or a gradient is not finite
    └── RunError           a run directory or a checkpoint cannot be read, written or resumed
        └── Interrupted        a signal asked the run to stop, and it did so after a checkpoint

A message says what is wrong, where, the value that was found, the rule, and the way out.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "DdkmixError",
    "Interrupted",
    "MixtureExhausted",
    "ModelError",
    "NumericsError",
    "RowError",
    "RunError",
    "StorageError",
]


class DdkmixError(Exception):
    """Base of every error that a user can cause and mend; its message is one line."""


class ConfigError(DdkmixError):
    """A config, an override or an argument is wrong."""


class DataError(DdkmixError):
    """A domain card, a shard or a packed row is wrong."""


class RowError(DataError):
    """A packed row is not the one that was packed: cut, damaged, or of other data."""


class StorageError(DataError):
    """A store cannot be reached, refuses, or does not have the file; says nothing about the data in it."""


class MixtureExhausted(DataError):
    """No domain may serve another row: each is at its `max_epochs` or has no weight."""


class ModelError(DdkmixError):
    """A model or a tokenizer cannot be used as asked."""


class NumericsError(DdkmixError):
    """A loss or a gradient is not finite."""


class RunError(DdkmixError):
    """A run directory or a checkpoint cannot be read, written or resumed."""


class Interrupted(RunError):
    """A signal asked the run to stop, and it did so after a checkpoint; exit code 130."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an unknown-name message: the nearest known name, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."
