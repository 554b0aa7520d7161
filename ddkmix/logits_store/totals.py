"""What a store holds and what it leaves out, summed over tokens: kept in each sidecar, shown by `capture`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ddkmix.logits_store.codec import TokenColumns


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over the predicted tokens of some rows."""

    rows: int = 0
    tokens: int = 0
    """Predicted tokens."""
    bytes: int = 0
    """Of records, without the 12 that a row costs in tables."""
    entries: int = 0
    """Classes that are kept."""
    kept_mass: float = 0.0
    """Of the entries that stand for themselves."""
    teacher_nats: float = 0.0
    """The teacher's own loss."""
    entropy: float = 0.0
    """The teacher's, nats."""
    tail_entropy: float = 0.0
    """The part of it that lies inside the rest class, r H(p | rest), which one class for the rest cannot
    express; nats."""

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def to_facts(self) -> dict[str, str]:
        """Text for a sidecar's metadata."""
        return {name: repr(value) for name, value in asdict(self).items()}

    def to_json(self) -> dict[str, Any]:
        """The sums, and means over tokens; None where there is none."""
        counts = {"rows": self.rows, "tokens": self.tokens, "bytes": self.bytes}
        means = {}
        for name in ("bytes", "entries", "kept_mass", "teacher_nats", "entropy", "tail_entropy"):
            mean = getattr(self, name) / self.tokens if self.tokens else None
            means[f"{name}_per_token"] = mean if mean is None or np.isfinite(mean) else None
        return {**counts, **means}


def totals_of_facts(facts: Mapping[str, str]) -> Totals:
    """What `Totals.to_facts` wrote.

    Raises:
        ValueError, KeyError: the text is not that.
    """
    sums: dict[str, Any] = {
        f.name: (int if isinstance(f.default, int) else float)(facts[f.name]) for f in fields(Totals)
    }
    return Totals(**sums)


def totals_of(columns: TokenColumns, num_bytes: int) -> Totals:
    """Of one row, as it is read back, so that a resumed capture sums the same numbers."""
    sizes = columns.counts + columns.drawn_counts
    token = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(token)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    exact = place < columns.counts[token]
    log_probs = columns.log_probs[exact].astype(np.float64)
    outside = columns.outside
    rest = np.where(outside > 0, outside * np.log(outside.clip(1e-300)), 0.0).sum()
    bucketed = -(np.exp(log_probs) * log_probs).sum() - rest
    entropy = float(columns.entropy.sum(dtype=np.float64))
    return Totals(
        rows=1,
        tokens=len(sizes),
        bytes=num_bytes,
        entries=len(columns.ids),
        kept_mass=float((1.0 - outside).sum()),
        teacher_nats=float(columns.teacher_nats.sum(dtype=np.float64)),
        entropy=entropy,
        tail_entropy=max(entropy - float(bucketed), 0.0),
    )


def total(parts: Iterable[Totals]) -> Totals:
    """The sum of some."""
    return sum(parts, Totals())
