"""Temperatures of student and teacher: one for all tokens, or one for each that follows from the logits.

What is published and what is not:

- `norm_kd` (Chi et al. 2023, arXiv 2308.00520; the authors' code): tau = temperature x standard deviation of
  the logits over the vocabulary (dividing by V - 1), each side its own, and the loss times the teacher's
  tau**2. Their gradient runs through the student's standard deviation, so ours does.
- `wttm` (Zheng and Yang 2024, arXiv 2402.11148): p tempered, q not, and the loss of a token times
  sum_v p(v)**gamma, gamma = 1 / temperature. That weight is 1 for a certain teacher and V**(1 - gamma) for
  one that knows nothing: 221 at temperature 2 and 49,152 classes.
- `adakd_sd`, `adakd_h`: two of the rows of Table 3 of pre-training distillation (arXiv 2410.16215; +1.2 % and
  +2.8 %, no better than a good fixed temperature). Their formulas could not be found, so these are OUR
  RECONSTRUCTION of "a temperature from the teacher's standard deviation, or entropy":
  tau = 1 + (temperature - 1) sharpness(p), shared by both sides, with sharpness in [0, 1] either
  `adakd_sd`: the standard deviation of p(1), ..., p(V) over the largest that V probabilities can have, or
  `adakd_h`: 1 - H(p) / log V. A certain teacher is tempered fully and one that knows nothing not at all, the
  direction of NormKD. Depends on the teacher alone, so there is nothing to differentiate.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ddkmix.batch import TruncatedSignal
from ddkmix.losses.closed_form import LogProbs

_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tempering:
    """What divides the logits of a call, and what its loss is multiplied by."""

    student: float | Float[Tensor, " n"]
    """May depend on the student's logits: norm_kd's does."""
    teacher: float | Float[Tensor, " n"]
    factor: float | Float[Tensor, " n"]


def norm_kd(
    temperature: float, student_logits: Float[Tensor, "n V"], teacher_logits: Float[Tensor, "n V"], power: int
) -> Tempering:
    """NormKD: both sides by multiples of their own standard deviations.

    Args:
        temperature: factor on the standard deviations.
        student_logits: the result is differentiable in them.
        teacher_logits: of the same classes.
        power: of the teacher's temperature, which multiplies the loss; 0 for none.
    """
    teacher = temperature * deviation(teacher_logits)
    return Tempering(student=temperature * deviation(student_logits), teacher=teacher, factor=teacher**power)


def through_deviation(
    student_logits: Float[Tensor, "n V"],
    log_q: Float[Tensor, "n V"],
    slope: Float[Tensor, "n V"],
    temperature: float,
) -> Float[Tensor, "n V"]:
    """What NormKD's student temperature adds to a slope, because it depends on the student's logits z.

    With u = z / tau and g = d loss / du, tau = temperature x std(z):  d loss / dz = g / tau plus
    -(sum_v g_v u_v) / tau x d tau / dz,  d tau / dz_v = temperature**2 (z_v - mean(z)) / ((V - 1) tau).

    Args:
        student_logits: z.
        log_q: log softmax(u).
        slope: d loss / d log_q.
        temperature: factor on the standard deviation.
    """
    absent = student_logits == -math.inf
    z, count = student_logits.masked_fill(absent, 0.0), (~absent).sum(-1, keepdim=True)
    tau = temperature * deviation(student_logits)[:, None]
    by_u = slope - log_q.exp() * slope.sum(-1, keepdim=True)
    by_tau = -(by_u * z).sum(-1, keepdim=True) / tau
    from_mean = (z - z.sum(-1, keepdim=True) / count).masked_fill(absent, 0.0)
    return by_tau * temperature**2 / ((count - 1) * tau) * from_mean


def ada_kd(
    form: str, temperature: float, log_p: Float[Tensor, "n V"], power: int, *, both: bool
) -> Tempering:
    """AdaKD as reconstructed above: a temperature between 1 and `temperature`, by the teacher's sharpness.

    Args:
        form: `adakd_sd` or `adakd_h`.
        temperature: that of a teacher who is certain.
        log_p: the teacher's log-probabilities at temperature 1.
        power: of the temperature, which multiplies the loss if it is that of both sides; 0 for none.
        both: whether the student is tempered too.
    """
    tau = 1.0 + (temperature - 1.0) * (_by_deviation(log_p) if form == "adakd_sd" else _by_entropy(log_p))
    return Tempering(student=tau if both else 1.0, teacher=tau, factor=tau**power if both else 1.0)


def power_sum(teacher: LogProbs | TruncatedSignal, temperature: float) -> Float[Tensor, " n"] | float:
    """sum_v p(v) ** (1 / temperature), WTTM's weight of each token; a truncated signal has its logarithm."""
    if temperature == 1.0:
        return 1.0
    if isinstance(teacher, TruncatedSignal):
        return teacher.log_z[temperature].exp()
    log_z = teacher.logits.logsumexp(-1)
    return ((teacher.logits / temperature).logsumexp(-1) - log_z / temperature).exp()


def deviation(logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Standard deviation over the classes, dividing by their number less one; -inf is no class."""
    there = logits != -math.inf
    count = there.sum(-1)
    filled = logits.masked_fill(~there, 0.0)
    mean = filled.sum(-1, keepdim=True) / count[:, None]
    squares = (filled - mean).masked_fill(~there, 0.0).square().sum(-1)
    # equal logits have none, and neither a quotient by it nor its derivative would exist
    return (squares / (count - 1)).clamp(min=_LEAST_DEVIATION**2).sqrt()


def _by_deviation(log_p: Tensor) -> Tensor:
    """Standard deviation of p over its largest value, (1 - 1/V) / V under the root."""
    classes = log_p.shape[-1]
    squares = (2 * log_p).logsumexp(-1).exp()
    return ((squares * classes - 1) / (classes - 1)).clamp(0.0, 1.0).sqrt()


def _by_entropy(log_p: Tensor) -> Tensor:
    """1 - H(p) / log V."""
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    return (1.0 - entropy / math.log(log_p.shape[-1])).clamp(0.0, 1.0)
