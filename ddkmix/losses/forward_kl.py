"""Forward KL, the standard distillation term: KL(teacher || student).

DDK's Eq. 3 prints the arguments the other way round but calls the reverse direction a different method, so
this is its term (gamma = 0.2, temperature 1).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ddkmix.losses.divergence import NEEDS_ALL_LOGITS, Divergence

__all__ = ["ForwardKL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardKL(Divergence):
    """KL(teacher || student), the standard distillation term (Hinton et al. 2015, arXiv 1503.02531).

        KL[i] = temperature**2 * sum_v p_i(v) (log p_i(v) - log q_i(v))
        p = softmax(teacher_logits / temperature),  q = softmax(student_logits / temperature)

    The second term of DDK's objective (arXiv 2407.16154, Eq. 3) with weight 0.2 and temperature 1, and the
    KLD of pre-training distillation (arXiv 2410.16215, Eq. 3).

    A teacher with p = (3/4, 1/4) and an undecided student: 3/4 ln(3/2) + 1/4 ln(1/2).

    >>> import torch
    >>> from ddkmix.losses import ForwardKL
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> nats = ForwardKL()(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [0.1308]
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket", "renormalize", "drop", "drawn"})
    """It is linear in p, so random draws estimate it without bias."""

    def between(self, log_q: Any, log_p: Any) -> Any:
        """sum_v p (log p - log q)."""
        return _weighted(log_p.exp(), self._nats(log_q, log_p))

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Its derivative by log q is -p."""
        p = log_p.exp()
        # 0 x inf is nan and counts nothing, but what was nan in p stays
        return (p * self._nats(log_q, log_p)).nansum(-1) + 0 * p.sum(-1), -p

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The sum of each token; see `Divergence.__call__` for the arguments."""
        from ddkmix.losses.classes import kind_of
        from ddkmix.losses.closed_form import LogProbs

        if kind_of(teacher) in ("dense", "bucket"):
            return Divergence.__call__(self, student_logits, teacher, labels)
        return self._over_entries(LogProbs(student_logits), teacher)[0]

    def value_and_slope(self, student: Any, teacher: Any, labels: Any) -> tuple[Any, Any]:
        """The sum and its derivative, -p of every class or the weights of the entries."""
        from ddkmix.losses.classes import kind_of
        from ddkmix.losses.closed_form import LogProbs, keeps_up

        if isinstance(teacher, LogProbs):
            derived = ("between", "between_and_slope", "_nats")
            shared = all(keeps_up(type(self), "_over_all", name) for name in derived)
            if shared and self.adapt not in NEEDS_ALL_LOGITS:
                return self._over_all(student, teacher)
        if isinstance(teacher, LogProbs) or kind_of(teacher) == "bucket":
            return Divergence.value_and_slope(self, student, teacher, labels)
        return self._over_entries(student, teacher)

    def _over_all(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """sum_v p (log p - log q), from logits and normalisers: half the passes over all classes."""
        from ddkmix.losses.closed_form import Slope

        by = self.tempering(student, teacher)
        p = teacher.times(teacher.logits.new_ones((len(teacher.logits), 1)), by.teacher)
        nats = (teacher.logits / by.teacher).sub_(student.logits, alpha=1 / by.student)
        from_sums = student.log_normaliser(by.student) - teacher.log_normaliser(by.teacher)
        # 0 x inf is nan and counts nothing; a nan of the logits is in the normalisers too
        values = (p * nats).nansum(-1) + from_sums[:, 0]
        return by.factor * values, Slope(temperature=by.student, factor=-by.factor, dense=p)

    def _over_entries(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """The sum over a truncated signal's entries alone, and its slope."""
        from ddkmix.losses.classes import entry_log_probs, entry_weights
        from ddkmix.losses.closed_form import Slope

        tempered = self.tempering(student, teacher)
        weights = entry_weights(teacher, self.temperature)
        log_p = weights.log() if teacher.draws is None else entry_log_probs(teacher, self.temperature)
        log_q = student.of(teacher.ids, tempered.student)
        slope = Slope(temperature=tempered.student, factor=tempered.factor, ids=teacher.ids, entries=-weights)
        return tempered.factor * _weighted(weights, self._nats(log_q, log_p)), slope

    def _nats(self, log_q: Any, log_p: Any) -> Any:
        """What is averaged over p."""
        return log_p - log_q


def _weighted(p: Any, nats: Any) -> Any:
    """sum_v p x nats, where p = 0 adds nothing although 0 x inf would be nan."""
    return (p * nats).masked_fill(p == 0, 0.0).sum(-1)
