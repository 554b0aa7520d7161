"""What a run writes down and shows: JSON lines always, a progress bar on a terminal.

`metrics.jsonl` and `intervals.jsonl` hold nothing but what the run computes, so that an interrupted and
resumed run leaves the very bytes of an uninterrupted one. Times go to `timings.jsonl`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddkmix.errors import RunError
from ddkmix.fingerprint import write_atomically
from ddkmix.records import read_lines

__all__ = ["Bar", "JsonLines", "progress_bar", "weights_note"]


class JsonLines:
    """An append-only file of one JSON object per line, each with a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; in the file (if not on the platter) when this returns."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}); free space.") from None

    def last(self) -> dict[str, Any] | None:
        """The last whole line, if there is one."""
        records = list(read_lines(self.path)) if self.path.exists() else []
        return records[-1] if records else None

    def rewind(self, step: int) -> None:
        """Drop every line of `step` or later, and a last line that a killed process left unfinished."""
        if not self.path.exists():
            return
        kept = [record for record in read_lines(self.path) if record["step"] < step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))


@contextmanager
def progress_bar(description: str, *, total: int | None, shown: bool) -> Iterator["Bar"]:
    """A progress bar on a terminal; nothing at all elsewhere."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (shown and console.is_terminal),
    )
    with progress:
        yield Bar(progress, description, total)


class Bar:
    """One bar."""

    def __init__(self, progress: Progress, description: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="")

    def update(self, done: int, *, total: int | None = None, note: str | None = None) -> None:
        """Show that `done` of `total` are done, and a short note."""
        self._progress.update(self._task, completed=done, total=total)
        if note is not None:
            self._progress.update(self._task, note=note)

    def warn(self, line: str) -> None:
        """A line on stderr, above the bar where there is one."""
        console = self._progress.console
        console.print(f"ddkmix: warning: {line}", markup=False, highlight=False, emoji=False, soft_wrap=True)


def weights_note(weights: Mapping[str, float]) -> str:
    """Mixture weights in a few characters: `code .21 math .14`."""
    return " ".join(f"{name} {weight:.2f}".replace(" 0.", " .") for name, weight in weights.items())
