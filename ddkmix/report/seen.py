"""What a step saw: the rows of its batch by name, and their text."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddkmix.errors import ConfigError, DataError, ModelError, RunError, did_you_mean
from ddkmix.provenance import DataBlock
from ddkmix.replay import Replay, SeenRow
from ddkmix.report.gaps import markdown_line, render_table
from ddkmix.tokenizer import read_tokenizer

SeenFormat = Literal["table", "json", "markdown", "text"]
_CELL_CHARS = 80
"""Characters of text in a cell of a table, unless told otherwise."""
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that steer a terminal; documents may hold any of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What to print, and what to say about it."""

    text: str
    notes: tuple[str, ...]
    """One line each; not part of the report."""


def parse_steps(text: str) -> tuple[int, int]:
    """`12` or `10:20`, both ends included.

    Raises:
        ConfigError: it is neither.
    """
    if not re.fullmatch(r"\d+(:\d+)?", text):
        raise ConfigError(f"--step {text}: must be a step, 12, or a range with both ends, 10:20.")
    first, _, last = text.partition(":")
    return int(first), int(last or first)


def render_seen(
    run_dir: Path,
    steps: tuple[int, int],
    style: SeenFormat,
    *,
    domain: str | None = None,
    chars: int | None = None,
) -> Seen:
    """The rows of some steps of a run, in slot order.

    Args:
        run_dir: the run.
        steps: first and last, counted from 1 as in metrics.jsonl.
        style: "text" prints whole texts one after the other, the others a line or record per row.
        domain: only its rows.
        chars: characters of text per row; 80 in tables and all elsewhere when None, no text at all when 0.

    Raises:
        RunError: the steps do not exist or cannot be planned again, or no such domain is in the run.
    """
    replay = Replay(run_dir)
    known = sorted({name for block in replay.blocks for name in block.settings.domains})
    if domain is not None and domain not in known:
        raise RunError(f"{run_dir} has no domain {domain!r}; {did_you_mean(domain, known)}")
    if chars is None and style in ("table", "markdown"):
        chars = _CELL_CHARS
    rows = [row for row in replay.rows(*steps) if domain in (None, row.domain)]
    notes = []
    if steps[1] > replay.last_step:
        notes.append(
            f"step {steps[1]} is not recorded as taken (the last one is {replay.last_step}); these are the "
            "rows that it has or will have."
        )
    texts: Sequence[str | None] = [None] * len(rows)
    if chars != 0:
        reader = _Texts(replay)
        texts = [reader.of(row) for row in rows]
        notes += reader.notes
        replay.close()
    cut = [None if text is None else _cut(text, chars) for text in texts]
    return Seen(text=_render(rows, cut, style, steps), notes=tuple(notes))


class _Texts:
    """Rows as text, as far as rows and tokenizer are still there."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._tokenizers: dict[int, Any] = {}
        self._missing: dict[tuple[str, str], str] = {}
        self._no_tokenizer: str | None = None

    @property
    def notes(self) -> list[str]:
        """Why some rows have no text, and how to get it back."""
        lines = [] if self._no_tokenizer is None else [self._no_tokenizer]
        if self._missing:
            reasons = list(dict.fromkeys(self._missing.values()))
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            lines.append(
                f"no text: {reasons[0]}{more}; put it back, or run `ddkmix pack "
                f"{self._replay.run_dir / 'config.yaml'}` where the run was started: the same documents give "
                "the same rows."
            )
        return lines

    def of(self, row: SeenRow) -> str | None:
        """The text of a row, or None."""
        tokenizer = self._tokenizer(self._replay.block(row.step))
        place = (row.domain, row.shard)
        if tokenizer is None or place in self._missing:
            return None
        try:
            tokens = self._replay.packed(row.step).tokens(row.domain, row.shard, row.row)
        except DataError as error:
            self._missing[place] = str(error).rstrip(".")
            return None
        return str(tokenizer.decode(tokens, skip_special_tokens=False))

    def _tokenizer(self, block: DataBlock) -> Any:
        if block.from_step not in self._tokenizers:
            self._tokenizers[block.from_step] = self._find(block)
        return self._tokenizers[block.from_step]

    def _find(self, block: DataBlock) -> Any:
        """The run's tokenizer from where it was read, or the copy that was saved with the student."""
        record = block.tokenizer
        for folder in (Path(record.path).parent, self._replay.run_dir / "student"):
            try:
                card = read_tokenizer(str(folder), separator=record.separator)
            except (ModelError, ConfigError):
                continue
            if card.fingerprint == record.fingerprint:
                from tokenizers import Tokenizer

                return Tokenizer.from_file(str(card.path))
        self._no_tokenizer = (
            f"no text: the run's tokenizer {record.name} (fingerprint {record.fingerprint[:12]}) is neither "
            f"at {record.path} nor in {self._replay.run_dir / 'student'}; put its tokenizer.json back."
        )
        return None


def _render(
    rows: Sequence[SeenRow], texts: Sequence[str | None], style: SeenFormat, steps: tuple[int, int]
) -> str:
    if style == "json":
        return json.dumps([_record(*pair) for pair in zip(rows, texts, strict=True)], indent=1)
    if style == "text":
        return "\n\n".join(
            f"=== step {row.step} slot {row.slot}  {_named(row)}  (j {row.j}, epoch {row.epoch})\n"
            f"{'' if text is None else _harmless(text)}"
            for row, text in zip(rows, texts, strict=True)
        )
    several = steps[0] != steps[1]
    header = [*(["step"] if several else []), "slot", "domain", "row", "j", "epoch", "text"]
    cells = [
        [
            *([str(row.step)] if several else []),
            str(row.slot),
            row.domain,
            _named(row),
            str(row.j),
            str(row.epoch),
            "" if text is None else " ".join(_harmless(text).split()),
        ]
        for row, text in zip(rows, texts, strict=True)
    ]
    if style == "markdown":
        escaped = [[html.escape(cell, quote=False).replace("|", "\\|") for cell in line] for line in cells]
        lines = [header, ["---"] * len(header), *escaped]
        return "\n".join(map(markdown_line, lines))
    title = f"steps {steps[0]:,} to {steps[1]:,}" if several else f"step {steps[0]:,}"
    return render_table(header, cells, f"{title}, {len(rows):,} rows", left=("domain", "row", "text"))


def _record(row: SeenRow, text: str | None) -> dict[str, Any]:
    return {
        "step": row.step,
        "slot": row.slot,
        "domain": row.domain,
        "name": row.name,
        "shard": row.shard,
        "row": row.row,
        "j": row.j,
        "epoch": row.epoch,
        "instead_of": row.instead_of,
        "reason": row.reason,
        "text": text,
    }


def _named(row: SeenRow) -> str:
    if row.instead_of is None:
        return row.name
    return f"{row.name} instead of {row.instead_of}{f' ({_harmless(row.reason)})' if row.reason else ''}"


def _cut(text: str, chars: int | None) -> str:
    return text if chars is None or len(text) <= chars else text[:chars] + "…"


def _harmless(text: str) -> str:
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
