"""Where a report goes: the terminal, a pipe, or a file that is replaced only if it is one of ours.

What can be refused is refused by `destination` before anything is measured or read.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ddkmix.errors import ConfigError, RunError
from ddkmix.fingerprint import replacing
from ddkmix.report.gaps import Format
from ddkmix.report.page import GENERATOR, render_page
from ddkmix.report.story import Story

Style = Literal["table", "json", "markdown", "html", "png"]
_SUFFIXES: dict[str, Style] = {
    ".html": "html", ".htm": "html", ".png": "png", ".json": "json", ".md": "markdown", ".txt": "table"
}  # fmt: skip
_MARKS = (f'name="generator" content="{GENERATOR}"'.encode(), b"Software\0" + GENERATOR.encode())
_HEAD_BYTES = 4096
"""Of a file, which hold its mark if it is ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """What a report looks like and where it goes; checked."""

    style: Style
    path: Path | None
    """None is standard output."""

    def send(self, story: Callable[[], Story], *, words: Callable[[Format], str]) -> None:
        """Make the report and write it; a file appears whole or not at all.

        Args:
            story: what pages and pictures tell.
            words: the report as text, in a format that is text.

        Raises:
            RunError: the file cannot be written.
        """
        content = self._content(story, words)
        if self.path is None:
            sys.stdout.write(content.decode())
            return
        try:
            with replacing(self.path) as file:
                file.write(content)
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output."
            ) from None
        print(f"report: {self.path}", file=sys.stderr)

    def _content(self, story: Callable[[], Story], words: Callable[[Format], str]) -> bytes:
        if self.style == "png":
            from ddkmix.report.picture import render_picture

            return render_picture(story())
        if self.style == "html":
            return render_page(story()).encode()
        return f"{words(self.style)}\n".encode()


def destination(style: str | None, path: Path | None, *, force: bool = False) -> Destination:
    """The format and place of a report.

    Args:
        style: what `--format` says; by the file's ending when None, and a table without a file.
        path: what `--output` says; None is standard output.
        force: what `--force` says: whatever file stands there may be replaced.

    Raises:
        ConfigError: the format is unknown or cannot go there, its library is missing, or the file is
            somebody else's.
    """
    if style is None:
        style = "table" if path is None else _SUFFIXES.get(path.suffix.lower())
        if style is None:
            raise ConfigError(
                f"--output {path}: say the --format, or end the name in {', '.join(_SUFFIXES)}."
            )
    known = get_args(Style)
    if style not in known:
        raise ConfigError(f"--format {style}: must be {', '.join(known[:-1])} or {known[-1]}.")
    if style == "png" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--format png: matplotlib is not installed; pip install 'ddkmix[plots]'.")
    if style == "png" and path is None:
        raise ConfigError("--format png: a picture goes to a file; add --output FILE.png.")
    if path is None and style == "html" and sys.stdout.isatty():
        raise ConfigError("--format html: a page is not for a terminal; add --output FILE.html, or redirect.")
    if path is not None:
        _check_free(path, force=force)
    return Destination(style=style, path=path)  # type: ignore[arg-type]  # checked above


def _check_free(path: Path, *, force: bool) -> None:
    """A page or picture of ours may be replaced by a newer one; anything else that stands there is worth
    more, and text bears no mark that would tell."""
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file in it.")
    if not path.exists():
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise ConfigError(f"--output {path}: {nearest} cannot be written to; choose another folder.")
        return
    if force:
        return
    with path.open("rb") as file:
        start = file.read(_HEAD_BYTES)
    if not any(mark in start for mark in _MARKS):
        raise ConfigError(
            f"--output {path} exists and is no page or picture of ddkmix; replace it with --force, or choose "
            "another name."
        )
