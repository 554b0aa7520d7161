"""What packing kept and dropped, added up: over the shards of a split, over splits and domains."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddkmix.index import ShardIndex

_COUNTS = ("documents", "truncated", "separators", "tokens", "padding", "bytes", "rows")


def split_report(shards: Sequence[ShardIndex], repeated: int | None) -> dict[str, Any]:
    """The facts of one split.

    Args:
        shards: all of it.
        repeated: kept documents that stand earlier in the split, word for word; None if nobody counted.
    """
    facts = [{**shard.report, "rows": shard.num_rows, "repeated": 0} for shard in shards]
    return {**add_reports(facts), "repeated": repeated}


def add_reports(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several reports as one; what one of them does not know, the sum does not know."""
    totals: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
    dropped: Counter[str] = Counter()
    repeated: int | None = 0
    for report in reports:
        totals.update({name: report.get(name, 0) for name in _COUNTS})
        dropped.update(report.get("dropped", {}))
        if "prompt_tokens" in report:  # of the tokens, those of prompts
            totals["prompt_tokens"] += report["prompt_tokens"]
        more = report.get("repeated")
        repeated = None if repeated is None or more is None else repeated + more
    places = totals["padding"] + totals["tokens"]
    return {
        **totals,
        "dropped": dict(sorted(dropped.items())),
        "repeated": repeated,
        "padding_share": round(totals["padding"] / max(places, 1), 6),
        "bytes_per_token": round(totals["bytes"] / max(totals["tokens"], 1), 3),
    }
