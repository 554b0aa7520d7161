"""Optimal transport between the tokens of a group: their distances, and Sinkhorn's plan."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import TruncatedSignal
from ddkmix.losses.classes import entry_log_probs


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherSide:
    """The teacher's probabilities of some tokens: of all classes, or of those in `ids`."""

    p: Float[Tensor, "n C"]
    """Probability 0 in unused places."""
    ids: Int[Tensor, "n C"] | None = None
    """Which classes; None for all of the vocabulary."""

    def at(self, part: slice) -> "TeacherSide":
        """The same of some tokens only."""
        return TeacherSide(p=self.p[part], ids=None if self.ids is None else self.ids[part])


def teacher_side(
    teacher: Float[Tensor, "n V"] | TruncatedSignal, temperature: float, top_k: int | None
) -> TeacherSide:
    """Probabilities at a temperature, of the `top_k` likeliest classes if so wanted."""
    if isinstance(teacher, TruncatedSignal):
        p, ids = entry_log_probs(teacher, temperature).exp(), teacher.ids
        if top_k is None or top_k >= p.shape[1]:
            return TeacherSide(p=p, ids=ids)
        first = p.topk(top_k)
        return TeacherSide(p=first.values, ids=ids.gather(1, first.indices))
    p = (teacher / temperature).softmax(-1)
    if top_k is None or top_k >= p.shape[1]:
        return TeacherSide(p=p)
    first = p.topk(top_k)
    return TeacherSide(p=first.values, ids=first.indices)


def distances(q: Float[Tensor, "g V"], teacher: TeacherSide) -> Float[Tensor, "g g"]:
    """L1 distance of student token i (row) and teacher token j (column).

    Over the classes of j and one for all others, where the teacher is known by some classes only.
    """
    if teacher.ids is None:
        return torch.cdist(q, teacher.p, p=1)
    # an unused place repeats a class: neither side may count it again
    seen = q[:, teacher.ids] * (teacher.p > 0)
    inside = (seen - teacher.p).abs().sum(-1)
    return inside + (seen.sum(-1) - teacher.p.sum(-1)).abs()


def plan(cost: Float[Tensor, "g g"], epsilon: float, iterations: int) -> Float[Tensor, "g g"]:
    """exp(-cost / epsilon), rows and then columns divided by their sums again and again.

    In logarithms, so that a small epsilon does not underflow. Columns sum to 1, rows nearly.
    """
    log_plan = -cost / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return log_plan.exp()
