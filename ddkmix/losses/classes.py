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


def kind_of(teacher: Tensor | TruncatedSignal) -> str:
    """`dense`, `drawn`, or the signal's tail."""
    if isinstance(teacher, Tensor):
        return "dense"
    return teacher.tail if teacher.draws is None else "drawn"


def class_log_probs(
    student_logits: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"] | TruncatedSignal,
    student_temperature: float | Float[Tensor, " n"],
    teacher_temperature: float | Float[Tensor, " n"],
) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
    """Log-probabilities of student and teacher; C is V, or K + 1 for a truncated signal (tail `bucket`)."""
    teacher = spread(teacher, student_logits.shape[1])
    student_logits = _divided(student_logits, student_temperature)
    if isinstance(teacher, Tensor):
        return student_logits.log_softmax(-1), _divided(teacher, teacher_temperature).log_softmax(-1)
    assert kind_of(teacher) == "bucket", "see accepts"
    log_p = entry_log_probs(teacher, teacher_temperature)
    absent = log_p == -math.inf
    log_z = student_logits.logsumexp(-1, keepdim=True)
    log_q = (student_logits.gather(1, teacher.ids) - log_z).masked_fill(absent, -math.inf)
    outside = student_logits.scatter(1, teacher.ids, -math.inf).logsumexp(-1, keepdim=True) - log_z
    rest = log_complement(log_p)
    return torch.cat([log_q, outside], dim=1), torch.cat([log_p, rest], dim=1)


def spread(
    teacher: Float[Tensor, "n V"] | TruncatedSignal, vocab_size: int
) -> Float[Tensor, "n V"] | TruncatedSignal:
    """A renormalised signal as logits of all classes, -inf in those that were not kept; anything else as it is.

    Softmax of them at any temperature is the published truncation, softmax(Truncate(z) / temperature)
    (arXiv 2410.16215, Eq. 4).
    """
    if isinstance(teacher, Tensor) or kind_of(teacher) != "renormalize":
        return teacher
    logits = teacher.log_probs.new_full((len(teacher.ids), vocab_size), -math.inf)
    # unused places repeat a class with -inf, which must not overwrite it
    return logits.scatter_reduce(1, teacher.ids, teacher.log_probs, "amax")


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
    log_p = entry_log_probs(teacher, temperature)
    if teacher.draws is None:
        return log_p.softmax(-1) if teacher.tail == "renormalize" else log_p.exp()
    assert teacher.drawn_mass is not None
    share = teacher.draws / teacher.num_draws * teacher.drawn_mass[:, None]
    drawn = share * (log_p - teacher.log_probs.clamp(min=-1e30)).exp()
    return torch.where(teacher.draws > 0, drawn, log_p.exp())


def log_complement(log_p: Float[Tensor, "n K"]) -> Float[Tensor, "n 1"]:
    """log(1 - sum of p), -inf where nothing is left."""
    total = log_p.logsumexp(-1, keepdim=True).clamp(max=0.0)
    return torch.log(-torch.expm1(total))


def _divided(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """At temperature 1 a division would only copy the two largest tensors of the step."""
    if isinstance(temperature, Tensor):
        return logits / temperature[:, None]
    return logits if temperature == 1.0 else logits / temperature
