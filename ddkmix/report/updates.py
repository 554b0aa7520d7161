"""The history of a run's updates in a line each: how far behind the student was, and what moved."""

from dataclasses import dataclass

import numpy as np

from ddkmix.report.scales import digits
from ddkmix.report.story import Story

HEADER = (
    "step", "mean gap", "worst gap", "of domain", "moved", "most gained", "most lost", "rows served"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRow:
    """One evaluation and the update that followed it; nan and empty where there is nothing to say."""

    step: int
    mean: float
    """Of the gaps over domains, nats per token; nan where one of them has none, since a mean of the others
    would fall when the worst domain diverges."""
    with_gap: int
    """Domains whose gap is finite."""
    domains: int
    """Domains that were measured."""
    worst: float
    """The largest gap, nats per token; nan where one is not finite."""
    where: str
    """Its domain, or the first without a finite gap."""
    moved: float
    """Share of the mixture that changed its domain: half the sum of all changes; nan at the first."""
    gained: str
    """The domain whose weight grew most, and by how much."""
    lost: str
    """The domain whose weight fell most, and by how much."""
    served: float
    """Rows of all domains so far."""

    @property
    def mean_cell(self) -> str:
        """The mean, or for how many domains there would be one."""
        missing = "" if self.with_gap == self.domains else f" ({self.with_gap} of {self.domains} domains)"
        return digits(self.mean) + missing

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADER`."""
        return [
            f"{self.step:,}",
            self.mean_cell,
            digits(self.worst) if self.with_gap == self.domains else "not finite",
            self.where or "–",
            digits(self.moved),
            self.gained or "–",
            self.lost or "–",
            digits(self.served, ",.0f"),
        ]


def update_rows(story: Story) -> list[UpdateRow]:
    """A row for each evaluation; changes are those since the evaluation before."""
    rows = []
    before: dict[str, float] = {}
    for moment, gaps in zip(story.moments, story.table("loss_gap"), strict=True):
        there = [i for i, name in enumerate(story.domains) if name in moment.losses]
        finite = np.isfinite(gaps[there])
        # the first that is not finite, or else the largest
        worst = there[int(np.argmax(gaps[there]) if finite.all() else np.argmin(finite))] if there else None
        weights = {name: float(weight) for name, weight in moment.weights.items()}
        names = sorted({*weights, *before}) if before else []
        change = {name: weights.get(name, 0.0) - before.get(name, 0.0) for name in names}
        rows.append(
            UpdateRow(
                step=moment.step,
                mean=float(gaps[there].mean()) if there else np.nan,
                with_gap=int(finite.sum()),
                domains=len(there),
                worst=float(gaps[worst]) if worst is not None else np.nan,
                where=story.domains[worst] if worst is not None else "",
                moved=sum(map(abs, change.values())) / 2 if change else np.nan,
                gained=_named(change, max(change, key=change.__getitem__, default=None)),
                lost=_named(change, min(change, key=change.__getitem__, default=None)),
                served=sum(moment.served.values()) if moment.served else np.nan,
            )
        )
        before = weights
    return rows


def _named(change: dict[str, float], name: str | None) -> str:
    """`code +0.112`; nothing where nothing moved."""
    if name is None or abs(change[name]) < 5e-4:  # would read 0.000
        return ""
    sign = "+" if change[name] > 0 else "−"
    return f"{name} {sign}{abs(change[name]):.3f}"
