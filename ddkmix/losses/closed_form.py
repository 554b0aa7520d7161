"""Values of losses and their derivatives by the student's log-probabilities, without autograd.

With log_q = log softmax(z / temperature), the derivative of any loss by the logits z is

    d loss / d z = (s - q sum_v s_v) / temperature,   s = d loss / d log_q

so a loss only has to say s, its slope, and never sees the softmax's own derivative. Slopes are bounded
where derivatives by q are not (forward KL: -p against -p / q), and slopes of several losses at one
temperature share q. A multiple of q in a slope changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEAST = -1e30
"""Stands for -inf where -inf - -inf would be nan."""

_FAINT, _FAR = 1e-30, -60.0
"""A sum of powers, and the logarithm of a share, below which float32 loses digits of them."""


class LogProbs:
    """log softmax(logits / temperature) of some tokens; what it takes is made once for each temperature.

    Most of the time of a loss over 49,000 classes is exponentials and passes over memory. So the log
    probabilities of all classes exist only if a loss asks for them; sums, single classes and gradients are
    made from exp((logits - largest) / temperature), which its normaliser needs anyway.
    """

    def __init__(self, logits: Float[Tensor, "n V"]) -> None:
        """`logits` are those of the student or of the teacher, at temperature 1."""
        self.logits = logits
        self._made: dict[float, Tensor] = {}
        self._powers: dict[float, tuple[Tensor, Tensor]] = {}

    def at(self, temperature: float | Tensor) -> Float[Tensor, "n V"]:
        """At one temperature for all tokens, or one for each (n,), which is not kept. Not to be changed."""
        if isinstance(temperature, Tensor):
            return (self.logits / temperature[:, None]).log_softmax(-1)
        if temperature not in self._made:
            divided = self.logits if temperature == 1.0 else self.logits / temperature
            self._made[temperature] = divided.log_softmax(-1)
        return self._made[temperature]

    def of(self, ids: Int[Tensor, "n K"], temperature: float | Tensor) -> Float[Tensor, "n K"]:
        """Log-probabilities of single classes."""
        if not self._is_fast(temperature):
            return self.at(temperature).gather(1, ids)
        assert isinstance(temperature, float)
        _, total = self._powers_at(temperature)
        return (self.logits.gather(1, ids) - self._largest) / temperature - total.log()

    def outside(self, ids: Int[Tensor, "n K"], temperature: float | Tensor) -> Float[Tensor, "n 1"]:
        """Log of the probability of all classes but `ids`, summed over them; -inf where there are none."""
        if self._is_fast(temperature):
            assert isinstance(temperature, float)
            powers, total = self._powers_at(temperature)
            inside = powers.gather(1, ids)
            rest = powers.scatter_(1, ids, 0.0).sum(-1, keepdim=True)
            powers.scatter_(1, ids, inside)
            if bool((rest > _FAINT).all()):
                return rest.log() - total.log()
        return self.at(temperature).scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)

    def times(
        self,
        row: Float[Tensor, "n 1"],
        temperature: float | Tensor,
        log_unit: Float[Tensor, "n 1"] | None = None,
    ) -> Float[Tensor, "n V"]:
        """row x q of every class, or row x q / unit; a new tensor."""
        if self._is_fast(temperature) and (log_unit is None or bool((log_unit > _FAR).all())):
            assert isinstance(temperature, float)
            powers, total = self._powers_at(temperature)
            return powers * (row / total if log_unit is None else row / (total * log_unit.exp()))
        log_q = self.at(temperature)
        return (log_q if log_unit is None else log_q - log_unit.clamp(min=_LEAST)).exp().mul_(row)

    def log_normaliser(self, temperature: float) -> Float[Tensor, "n 1"]:
        """log sum_v exp(logits / temperature)."""
        _, total = self._powers_at(temperature)
        return total.log() + self._largest / temperature

    def _is_fast(self, temperature: float | Tensor) -> bool:
        """Not where autograd looks on, which would see `outside` change what it remembers."""
        return (
            isinstance(temperature, float) and temperature not in self._made and not self.logits.requires_grad
        )

    @cached_property
    def _largest(self) -> Tensor:
        return self.logits.amax(-1, keepdim=True)

    def _powers_at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """exp((logits - largest) / temperature) and its sum."""
        if temperature not in self._powers:
            powers = torch.add(-self._largest / temperature, self.logits, alpha=1 / temperature).exp_()
            self._powers[temperature] = powers, powers.sum(-1, keepdim=True)
        return self._powers[temperature]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slope:
    """d loss / d log_q of some tokens, as a sum of up to three parts, times `factor`."""

    temperature: float | Float[Tensor, " n"] = 1.0
    """Of the log_q that it belongs to."""
    factor: float | Float[Tensor, " n"] = 1.0
    dense: Float[Tensor, "n V"] | None = None
    """Of every class."""
    ids: Int[Tensor, "n K"] | None = None
    """Classes of `entries`; a class may stand there several times."""
    entries: Float[Tensor, "n K"] | None = None
    """Of single classes."""
    rest: Float[Tensor, "n 1"] | None = None
    """By log q_rest, where q_rest is the mass of all classes but `ids`."""
    log_q_rest: Float[Tensor, "n 1"] | None = None
    """log q_rest; given with `rest`."""


def keeps_up(cls: type, derived: str, source: str) -> bool:
    """Whether method `derived` was written for the `source` that `cls` has.

    A class that overrides only `source` has inherited a derivative of something else.
    """
    for base in cls.__mro__:
        if derived in base.__dict__:
            return True
        if source in base.__dict__:
            return False
    return False


def by_autograd(
    function: Callable[[Any, Any], Any], log_q: Float[Tensor, "n C"], log_p: Float[Tensor, "n C"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n C"]]:
    """Values and slopes of a function of two distributions that has no closed form."""
    with torch.enable_grad():
        leaf = log_q.detach().requires_grad_()
        values = function(leaf, log_p.detach())
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slope


def logit_gradient(
    student: LogProbs, slopes: Sequence[tuple[Float[Tensor, " n"], Slope]]
) -> Float[Tensor, "n V"]:
    """d/dz sum_i sum_k row_k(i) loss_k(i) from (row_k, slope_k) of each loss, z = `student.logits`."""
    groups: dict[Any, list[tuple[Tensor, Slope]]] = {}  # tensors are keys by identity
    for row, slope in slopes:
        scaled = row * slope.factor / slope.temperature
        groups.setdefault(slope.temperature, []).append((scaled[:, None], slope))
    gradient: Tensor | None = None
    for temperature, group in groups.items():
        sums = torch.stack([row * _sum(slope) for row, slope in group]).sum(0)
        part = student.times(-sums, temperature)
        gradient = part if gradient is None else gradient.add_(part)
        for row, slope in group:
            _add(gradient, row, slope, student)
    return torch.zeros_like(student.logits) if gradient is None else gradient


def _sum(slope: Slope) -> Tensor:
    parts = [part.sum(-1) for part in (slope.dense, slope.entries, slope.rest) if part is not None]
    return torch.stack(parts).sum(0)[:, None]


def _add(gradient: Tensor, row: Tensor, slope: Slope, student: LogProbs) -> None:
    """gradient += row x slope; row is (n, 1)."""
    if slope.dense is not None:
        gradient.addcmul_(slope.dense, row)
    if slope.ids is None:
        return
    if slope.entries is not None:
        gradient.scatter_add_(1, slope.ids, slope.entries * row)
    if slope.rest is not None:
        # log q_rest is the log of a sum of q_v outside: its derivative by log q_v is q_v / q_rest
        shares = student.times(slope.rest * row, slope.temperature, slope.log_q_rest)
        gradient.add_(shares.scatter_(1, slope.ids, 0.0))
