"""Random worlds in closed form: rows served of every domain in, true gaps out, at any time.

    D_j = min(n_j, U_j) + U_j R (1 - exp(-max(n_j / U_j - 1, 0) / R))     distinct rows' worth of n_j rows
    E_i = sum_j M_ij D_j,  M_ii = 1                                       what domain i has been taught
    g_i = floor_i + (start_i - floor_i) (1 + E_i / scale_i)^(-exponent_i)     or, in `foreign` worlds,
    g_i = floor_i + (start_i - floor_i) exp(1 - (1 + E_i / scale_i)^exponent_i)

The first line is the data-constrained scaling law (Muennighoff et al., arXiv 2305.16264, with their fitted
R = 15.39): repeated rows lose their value exponentially. The last is no power law: a policy that fits one is
wrong there. Gaps depend on the rows served alone, not on their
order, so the best allocation is a fixed mixture; and g is convex in the rows, so it can be found for certain.

A world is a pure function of its seed. Its noise is drawn beforehand: all policies see the same.

Axis letters: N domains, K intervals, P points.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ddkmix.types import DomainLosses

REPEAT_DECAY = 15.39
"""R of the data-constrained law: passes over the data after which a row is worth 1/e of a new one."""
KINDS = ("learnable", "unlearnable", "noisy", "tiny", "transferring", "foreign", "mixed")
TEACHER_LOSS = 2.0
"""Nats per token, in every domain: policies may look at the gap only through losses."""
TOKEN_SPREAD = 1.5
"""Standard deviation over tokens of student - teacher, nats, of which `excess_loss` is made."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One world; arrays are by domain."""

    kind: str
    seed: int
    intervals: int
    rows_per_interval: int
    start: Float[np.ndarray, " N"]
    """Gap of the untrained student, nats per token."""
    floor: Float[np.ndarray, " N"]
    """Gap that no row removes, nats per token."""
    scale: Float[np.ndarray, " N"]
    """Rows after which the law begins to bend."""
    exponent: Float[np.ndarray, " N"]
    unique: Float[np.ndarray, " N"]
    """Rows that exist."""
    foreign: bool
    """Whether gaps fall by the second form of the law."""
    transfer: Float[np.ndarray, "N N"]
    """[i, j]: rows of domain i that one row of domain j is worth."""
    gap_error: Float[np.ndarray, " N"]
    """Standard error of the gap that an evaluation sees, nats per token."""
    noise: Float[np.ndarray, "evaluations N"]
    """Errors of every evaluation, in units of `gap_error`; evaluations = K, the first one before any row."""

    @property
    def count(self) -> int:
        """Domains."""
        return len(self.start)

    @property
    def budget(self) -> int:
        """Rows of the whole run."""
        return self.intervals * self.rows_per_interval

    @property
    def natural(self) -> Float[np.ndarray, " N"]:
        """Shares of the corpus as it is."""
        return self.unique / self.unique.sum()

    def distinct(self, rows: Float[np.ndarray, "*P N"]) -> Float[np.ndarray, "*P N"]:
        """D of the module's docstring: new rows that rows with repetitions are worth."""
        repeats = np.maximum(rows / self.unique - 1, 0)
        return np.minimum(rows, self.unique) - self.unique * REPEAT_DECAY * np.expm1(-repeats / REPEAT_DECAY)

    def gaps(self, rows: Float[np.ndarray, "*P N"]) -> Float[np.ndarray, "*P N"]:
        """True gaps after these rows of each domain, nats per token."""
        taught = self.distinct(rows) @ self.transfer.T
        return self.floor + (self.start - self.floor) * self._left(1 + taught / self.scale)

    def _left(self, bend: Float[np.ndarray, "*P N"]) -> Float[np.ndarray, "*P N"]:
        """Share of what can be removed that is still there."""
        return np.exp(1 - bend**self.exponent) if self.foreign else bend**-self.exponent

    def slopes(self, rows: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N N"]:
        """[i, j]: how the gap of domain i changes with one more row of domain j; <= 0."""
        repeats = np.maximum(rows / self.unique - 1, 0)
        worth = np.exp(-repeats / REPEAT_DECAY)
        bend = 1 + (self.transfer @ self.distinct(rows)) / self.scale
        rate = self.exponent / self.scale * self._left(bend) / bend
        fall = -(self.start - self.floor) * (rate * bend**self.exponent if self.foreign else rate)
        return fall[:, None] * self.transfer * worth

    def losses(self, rows: Float[np.ndarray, " N"], evaluation: int) -> DomainLosses:
        """What an evaluation sees after these rows: gaps with noise, and their standard errors.

        `forward_kl` is the gap (as if texts came from the teacher itself), and `excess_loss` its positive
        part over tokens whose gaps spread normally by 1.5 nats.
        """
        gap = self.gaps(rows) + self.gap_error * self.noise[evaluation]
        z = gap / TOKEN_SPREAD
        return DomainLosses(
            domains=tuple(f"d{i:02d}" for i in range(self.count)),
            student_loss=TEACHER_LOSS + gap,
            teacher_loss=np.full(self.count, TEACHER_LOSS),
            student_error=1.5 * self.gap_error,
            gap_error=self.gap_error,
            num_tokens=np.full(self.count, 500_000),
            num_bytes=np.full(self.count, 2_000_000),
            excess_loss=gap * _normal_cdf(z) + TOKEN_SPREAD * np.exp(-z * z / 2) / np.sqrt(2 * np.pi),
            forward_kl=np.maximum(gap, 0.0),
            rows_served=np.rint(rows).astype(np.int64),
        )


def _normal_cdf(z: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    from scipy.special import ndtr

    return ndtr(z)


def draw_world(seed: int, kind: str | None = None) -> World:
    """The world of a seed. Kinds take turns, so that 200 seeds hold 28 or 29 of each.

    Everything is drawn learnable, then the kind changes some of it. Scales and sizes are relative to the rows
    that each domain would be served by a uniform mixture.
    """
    kind = KINDS[seed % len(KINDS)] if kind is None else kind
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    count = int(rng.integers(3, 21))
    intervals = round(_log_uniform(rng, 8, 64).item())
    rows_per_interval = int(rng.integers(20, 200)) * int(rng.choice([16, 32, 64, 128]))
    each = intervals * rows_per_interval / count
    start = _log_uniform(rng, 0.5, 6.0) * np.exp(0.35 * rng.standard_normal(count))
    traits = {
        "start": start,
        "floor": start * rng.uniform(0.0, 0.4, count),
        "scale": each * _log_uniform(rng, 0.01, 1.0, count),
        "exponent": rng.uniform(0.2, 0.9, count),
        "unique": each * _log_uniform(rng, 1.0, 30.0, count),
        "transfer": np.eye(count),
        "gap_error": _log_uniform(rng, 0.002, 0.02) * _log_uniform(rng, 0.7, 1.4, count),
    }
    _change(traits, kind, each, rng)
    constant = rng.uniform(0.0, 0.9)  # share of the noise's variance that the held-out rows bring, every time
    noise = np.sqrt(constant) * rng.standard_normal(count)
    noise = noise + np.sqrt(1 - constant) * rng.standard_normal((intervals, count))
    return World(
        kind=kind,
        seed=seed,
        intervals=intervals,
        rows_per_interval=rows_per_interval,
        noise=noise,
        foreign=kind == "foreign",
        **traits,
    )


def _change(
    traits: dict[str, Float[np.ndarray, "..."]], kind: str, each: float, rng: np.random.Generator
) -> None:
    """Make a learnable world one of its kind, in place."""
    count = len(traits["start"])
    if kind == "unlearnable":
        _never_learn(traits, rng.permutation(count)[: int(rng.integers(1, max(1, count // 3) + 1))], rng)
    elif kind == "noisy":
        traits["gap_error"] = _log_uniform(rng, 0.05, 0.3) * _log_uniform(rng, 0.7, 1.4, count)
    elif kind == "tiny":
        _shrink(traits, rng.permutation(count)[: max(1, count // 2)], each, rng)
    elif kind == "transferring":
        traits["transfer"] = _teach_each_other(count, rng)
    elif kind == "mixed":
        fate = rng.choice(["learn", "never", "tiny"], count, p=[0.6, 0.15, 0.25])
        fate[rng.integers(count)] = "learn"
        _never_learn(traits, np.flatnonzero(fate == "never"), rng)
        _shrink(traits, np.flatnonzero(fate == "tiny"), each, rng)
        traits["gap_error"] = _log_uniform(rng, 0.003, 0.3, count)
        if rng.random() < 0.5:
            traits["transfer"] = _teach_each_other(count, rng)


def _never_learn(
    traits: dict[str, Float[np.ndarray, "..."]], which: Float[np.ndarray, " some"], rng: np.random.Generator
) -> None:
    """Large gaps that never fall."""
    traits["start"][which] *= rng.uniform(1.0, 2.5, len(which))
    traits["floor"][which] = traits["start"][which]


def _shrink(
    traits: dict[str, Float[np.ndarray, "..."]],
    which: Float[np.ndarray, " some"],
    each: float,
    rng: np.random.Generator,
) -> None:
    """So few rows that a uniform mixture would serve them 10 to 100 times."""
    traits["unique"][which] = each * _log_uniform(rng, 0.01, 0.1, len(which))


def _teach_each_other(count: int, rng: np.random.Generator) -> Float[np.ndarray, "N N"]:
    """Two pairs of domains in five help each other's students, by up to half a row a row."""
    worth = rng.uniform(0.0, 0.5, (count, count)) * (rng.random((count, count)) < 0.4)
    np.fill_diagonal(worth, 1.0)
    return worth


def _log_uniform(
    rng: np.random.Generator, low: float, high: float, count: int | None = None
) -> Float[np.ndarray, "..."]:
    return np.exp(rng.uniform(np.log(low), np.log(high), count))
