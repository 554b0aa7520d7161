"""Logits of the student and any teacher signal -> two distributions over the same classes.

Dense logits: all V classes. A truncated signal with the tail `bucket`: the K kept classes and one for the
rest. The student's rest is summed over the complement itself; 1 - sum of the kept would cancel where the
student is confident.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.batch import TruncatedSignal
from ddkmix.losses.closed_form import LogProbs


def kind_of(teacher: Tensor | TruncatedSignal) -> str:
    """`dense`, `drawn`, or the signal's tail."""
    if isinstance(teacher, Tensor):
        return "dense"
    return teacher.tail if teacher.draws is None else "drawn"


def all_classes(teacher: LogProbs | TruncatedSignal, vocab_size: int) -> LogProbs | TruncatedSignal:
    """A renormalised signal as logits of all classes, -inf in those that were not kept; others as they are.

    Softmax of them at any temperature is the published truncation, softmax(Truncate(z) / temperature)
    (arXiv 2410.16215, Eq. 4).
    """
    if isinstance(teacher, LogProbs) or kind_of(teacher) != "renormalize":
        return teacher
    logits = teacher.log_probs.new_full((len(teacher.ids), vocab_size), -math.inf)
    # unused places repeat a class with -inf, which must not overwrite it
    return LogProbs(logits.scatter_reduce(1, teacher.ids, teacher.log_probs, "amax"))


def log_probs_of(
    student: LogProbs,
    teacher: LogProbs | TruncatedSignal,
    student_temperature: float | Float[Tensor, " n"],
    teacher_temperature: float | Float[Tensor, " n"],
) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
    """Log-probabilities of both; C is V, or K + 1 for a truncated signal with the tail `bucket`."""
    if isinstance(teacher, LogProbs):
        return student.at(student_temperature), teacher.at(teacher_temperature)
    assert kind_of(teacher) == "bucket", "no losses are given what they do not accept"
    assert isinstance(teacher_temperature, float)
    log_p = entry_log_probs(teacher, teacher_temperature)
    kept = student.of(teacher.ids, student_temperature).masked_fill(log_p == -math.inf, -math.inf)
    rest = student.outside(teacher.ids, student_temperature)
    # where every class was kept there is no rest, whatever rounding has left of the teacher's
    outside = log_complement(log_p).masked_fill(rest == -math.inf, -math.inf)
    return torch.cat([kept, rest], dim=1), torch.cat([log_p, outside], dim=1)


def entry_log_probs(teacher: TruncatedSignal, temperature: float) -> Float[Tensor, "n K"]:
    """log p of the kept classes at a temperature; -inf in unused places."""
    if temperature == 1.0:
        return teacher.log_probs
    return teacher.log_probs / temperature - teacher.log_z[temperature][:, None]


def entry_weights(teacher: TruncatedSignal, temperature: float) -> Float[Tensor, "n K"]:
    """What each entry counts in a sum over classes weighted by p: see `TruncatedSignal`.

    Exact entries count p; drawn ones draws / num_draws x drawn_mass x p_temperature / p; with the tail
    `renormalize` all of them are scaled to sum to 1.
    """
    if kind_of(teacher) == "renormalize":  # needs no log Z, which a softmax takes off again
        return (teacher.log_probs / temperature).softmax(-1)
    log_p = entry_log_probs(teacher, temperature)
    if teacher.draws is None:
        return log_p.exp()
    assert teacher.drawn_mass is not None
    share = teacher.draws / teacher.num_draws * teacher.drawn_mass[:, None]
    drawn = share * (log_p - teacher.log_probs.clamp(min=-1e30)).exp()
    return torch.where(teacher.draws > 0, drawn, log_p.exp())


def log_complement(log_p: Float[Tensor, "n K"]) -> Float[Tensor, "n 1"]:
    """log(1 - sum of p), -inf where nothing is left."""
    total = log_p.logsumexp(-1, keepdim=True).clamp(max=0.0)
    return torch.log(-torch.expm1(total))
