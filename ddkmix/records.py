"""The lines that a run writes, checked as they are read: a damaged file is one line for whoever reads it."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddkmix.errors import RunError

_NUMBERS = ("weights", "served", "epochs", "natural")
"""Columns of an evaluation that hold one number for each domain."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON lines file; a last line that is unfinished (a run in progress) is left out.

    Raises:
        RunError: a line is no JSON object, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _object(line, path, number)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from None


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, " ".join(str(error).split())) from None
    if not isinstance(record, dict):
        raise _damaged(path, number, f"it holds {type(record).__name__}")
    return record


def _damaged(path: Path, number: int, reason: str) -> RunError:
    return RunError(
        f"{path} is damaged or of another version of ddkmix (line {number}: {reason}); mend or remove it."
    )


def read_evaluations(path: Path, needs: Collection[str]) -> list[dict[str, Any]]:
    """The records of an `intervals.jsonl`, each with a step and whatever of it is there in order.

    Args:
        path: the file; none is as good as an empty one.
        needs: columns that must be there: `weights`, `served`, `epochs` by domain, `losses`.

    Raises:
        RunError: a line is no such record, steps go down, or a column lacks a domain of the losses.
    """
    records: list[dict[str, Any]] = []
    for number, record in enumerate(read_lines(path) if path.exists() else (), start=1):
        before = records[-1]["step"] if records else 0
        wrong = _wrong(record, before, needs)
        if wrong:
            raise _damaged(path, number, wrong)
        records.append(record)
    return records


def _wrong(record: Mapping[str, Any], before: int, needs: Collection[str]) -> str | None:
    """What is wrong with an evaluation, in a few words."""
    step = record.get("step")
    if not isinstance(step, int) or step < 0:
        return f"step is {step!r}"
    if step < before:
        return f"step {step} comes after step {before}"
    missing = [name for name in needs if name not in record]
    if missing:
        return f"{' and '.join(sorted(missing))} missing"
    losses, planner, policy = record.get("losses", {}), record.get("planner", {}), record.get("policy")
    if not (isinstance(losses, dict) and all(isinstance(column, dict) for column in losses.values())):
        return "losses are not by domain"
    for name in _NUMBERS:
        column = record.get(name, {})
        if not (isinstance(column, dict) and all(map(_is_number, column.values()))):
            return f"{name} is not a number for each domain"
        if name in needs and not set(losses) <= set(column):
            return f"{name} lacks the domains {sorted(set(losses) - set(column))}"
    if not (isinstance(planner, dict) and isinstance(planner.get("version", 0), int)):
        return "planner is no state of a planner"
    if "planner" in record and "version" not in planner:
        return "planner has no version"
    return None if policy is None or isinstance(policy, dict) else "policy is no state of a policy"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
