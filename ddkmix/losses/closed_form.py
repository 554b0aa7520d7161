"""Values of losses and their derivatives by the student's log-probabilities, without autograd.

With log_q = log softmax(z / temperature), the derivative of any loss by the logits z is

    d loss / d z = (s - q sum_v s_v) / temperature,   s = d loss / d log_q

so a loss only has to say s, its slope, and never sees the softmax's own derivative. Slopes are bounded
where derivatives by q are not (forward KL: -p against -p / q), and slopes of several losses at one
temperature share q. A multiple of q in a slope changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEAST = -1e30
"""Stands for -inf where -inf - -inf would be nan."""


class LogProbs:
    """log softmax(logits / temperature) of some tokens, made once for each temperature."""

    def __init__(self, logits: Float[Tensor, "n V"]) -> None:
        """`logits` are those of the student or of the teacher, at temperature 1."""
        self.logits = logits
        self._made: dict[float, Tensor] = {}

    def at(self, temperature: float | Tensor) -> Float[Tensor, "n V"]:
        """At one temperature for all tokens, or one for each (n,), which is not kept. Not to be changed."""
        if isinstance(temperature, Tensor):
            return (self.logits / temperature[:, None]).log_softmax(-1)
        if temperature not in self._made:
            divided = self.logits if temperature == 1.0 else self.logits / temperature
            self._made[temperature] = divided.log_softmax(-1)
        return self._made[temperature]


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
        log_q = student.at(temperature)
        part = log_q.exp().mul_(-sum(row * _sum(slope) for row, slope in group))
        gradient = part if gradient is None else gradient.add_(part)
        for row, slope in group:
            _add(gradient, row, slope, log_q)
    return torch.zeros_like(student.logits) if gradient is None else gradient


def _sum(slope: Slope) -> Tensor:
    parts = [part.sum(-1) for part in (slope.dense, slope.entries, slope.rest) if part is not None]
    return torch.stack(parts).sum(0)[:, None]


def _add(gradient: Tensor, row: Tensor, slope: Slope, log_q: Tensor) -> None:
    """gradient += row x slope; row is (n, 1)."""
    if slope.dense is not None:
        gradient.addcmul_(slope.dense, row)
    if slope.ids is None:
        return
    if slope.entries is not None:
        gradient.scatter_add_(1, slope.ids, slope.entries * row)
    if slope.rest is not None:
        assert slope.log_q_rest is not None
        # log q_rest is the log of a sum of q_v outside: its derivative by log q_v is q_v / q_rest
        shares = (log_q - slope.log_q_rest.clamp(min=_LEAST)).exp_().mul_(slope.rest * row)
        gradient.add_(shares.scatter_(1, slope.ids, 0.0))
