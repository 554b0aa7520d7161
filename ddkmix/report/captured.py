"""What a logits store holds, and what checking it found, per domain."""

import json
from collections.abc import Mapping

from ddkmix.logits_store.totals import Totals, total
from ddkmix.report.gaps import Format, render_markdown, render_table
from ddkmix.verifying import Verified

_HEADER = [
    "domain", "rows", "tokens", "megabytes", "bytes/token", "entries/token", "kept mass", "tail nats",
    "teacher",
]  # fmt: skip


def render_captured(totals: Mapping[str, Totals], style: Format) -> str:
    """Sizes and losses of each domain's records and of all, in the format asked for.

    Tokens are predicted tokens, teacher is the teacher's own loss in nats per token. `tail nats` is the part
    of the teacher's entropy that lies inside the rest class, and so is lost on the student; no bias where
    classes are drawn.
    """
    every = {**totals, "total": total(totals.values())}
    if style == "json":
        return json.dumps({name: one.to_json() for name, one in every.items()}, indent=1, allow_nan=False)
    rows = [[name, *_cells(one)] for name, one in every.items()]
    return render_markdown(_HEADER, rows) if style == "markdown" else render_table(_HEADER, rows)


def _cells(one: Totals) -> list[str]:
    means = one.to_json()
    shown = {"bytes": 1, "entries": 1, "kept_mass": 3, "tail_entropy": 3, "teacher_nats": 3}
    values = {name: means[f"{name}_per_token"] for name in shown}
    return [
        f"{one.rows:,}",
        f"{one.tokens:,}",
        f"{one.bytes / 1e6:,.1f}",
        *("-" if values[name] is None else f"{values[name]:.{digits}f}" for name, digits in shown.items()),
    ]


_CHECKED = ["domain", "rows read", "damaged", "not captured", "asked again", "difference"]


def render_verified(verified: Verified, style: Format) -> str:
    """What `ddkmix capture --verify` found, in the format asked for.

    `difference` is the mean over tokens of the asked rows of sum_v p(v) |stored - recomputed log p(v)|, nats.
    """
    rows = {
        name: {
            "rows": one.rows,
            "damaged": len(one.damaged),
            "missing": one.missing,
            "asked": one.asked,
            "difference": one.difference,
        }
        for name, one in verified.domains.items()
    }
    if style == "json":
        return json.dumps(rows, indent=1, allow_nan=False)
    cells = [
        [
            name,
            *(f"{row[key]:,}" for key in ("rows", "damaged", "missing", "asked")),
            "-" if row["difference"] is None else f"{row['difference']:.2g}",
        ]
        for name, row in rows.items()
    ]
    return render_markdown(_CHECKED, cells) if style == "markdown" else render_table(_CHECKED, cells)
