"""What packing kept and dropped, per domain and split, as a table."""

import json
from collections.abc import Mapping
from typing import Any

from ddkmix.report.gaps import Format, markdown_line, render_table

_HEADER = [
    "domain", "split", "documents", "cut", "tokens", "bytes", "bytes/token", "rows", "padding", "repeated",
    "dropped",
]  # fmt: skip


def render_packing(report: Mapping[str, Mapping[str, Mapping[str, Any]]], style: Format) -> str:
    """The report of `pack.pack_report` in the format asked for.

    `cut` counts documents that lie in more than one row, `padding` is a share of all positions, `repeated`
    counts documents that stand earlier in their split, word for word; they are kept.
    """
    if style == "json":
        return json.dumps(report, indent=1, allow_nan=False)
    rows = [
        [name, split, *_cells(facts)] for name, splits in report.items() for split, facts in splits.items()
    ]
    if style == "markdown":
        lines = [_HEADER, ["---", "---"] + ["---:"] * (len(_HEADER) - 3) + ["---"], *rows]
        return "\n".join(map(markdown_line, lines))
    return render_table(_HEADER, rows)


def _cells(facts: Mapping[str, Any]) -> list[str]:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
    return [
        f"{facts['documents']:,}",
        f"{facts['truncated']:,}",
        f"{facts['tokens']:,}",
        f"{facts['bytes']:,}",
        f"{facts['bytes_per_token']:.2f}",
        f"{facts['rows']:,}",
        f"{facts['padding_share']:.2%}",
        "?" if facts["repeated"] is None else f"{facts['repeated']:,}",
        dropped or "-",
    ]
